//! Keys of other trainers, and what they are called here.
//!
//! Users come with their old files: a key of axolotl, Hugging Face, LLaMA-Factory, verl, torchtitan or DeepSpeed-Chat
//! gets its translation instead of "unknown". None of these names is a key of ours, nor may a recipe give one to an
//! option.

/// A key of another trainer.
#[derive(Debug)]
pub struct Foreign {
    /// As it is written there.
    pub key: &'static str,
    /// Who calls it so.
    pub who: &'static str,
    /// What to write here.
    pub ours: &'static str,
}

impl Foreign {
    /// The sentence for a message.
    pub fn help(&self) -> String {
        format!("`{}` is {}: here it is {}", self.key, self.who, self.ours)
    }
}

/// The translation of a key, `--` and `-` of a command line included.
pub fn find(key: &str) -> Option<&'static Foreign> {
    let key = key.trim_start_matches('-').replace('-', "_");
    KEYS.iter().find(|f| f.key == key)
}

const HF: &str = "Hugging Face's name";
const AXOLOTL: &str = "axolotl's name";
const FACTORY: &str = "LLaMA-Factory's name";
const VERL: &str = "verl's name";
const TITAN: &str = "torchtitan's name";
const LUDWIG: &str = "Ludwig's name";
const DSC: &str = "DeepSpeed-Chat's name";
const OFTEN: &str = "a common name";

const fn f(key: &'static str, who: &'static str, ours: &'static str) -> Foreign {
    Foreign { key, who, ours }
}

#[rustfmt::skip]
const KEYS: &[Foreign] = &[
    // Models
    f("model_name_or_path",              HF,      "an entry of `models`, named by the stage's role"),
    f("base_model",                      AXOLOTL, "an entry of `models`, such as `models: {base: <path>}`"),
    f("actor_model_name_or_path",        DSC,     "`actor`, the name of an entry of `models` or of a stage"),
    f("critic_model_name_or_path",       DSC,     "`critic`, the name of an entry of `models` or of a stage"),
    f("reward_model_path",               FACTORY, "`reward`, the name of an entry of `models` or of a stage"),
    f("tokenizer_name_or_path",          HF,      "`tokenizer` of an entry of `models`"),
    f("torch_dtype",                     HF,      "`bf16: true`"),
    f("dtype",                           DSC,     "`bf16: true`"),
    f("use_mixed_precision",             LUDWIG,  "`bf16: true`"),
    // Batches and lengths
    f("per_device_train_batch_size",     HF,      "`micro_batch_size`"),
    f("per_device_training_batch_size",  DSC,     "`micro_batch_size`"),
    f("per_device_generation_batch_size", DSC,    "`batch_size`, over all devices"),
    f("per_device_eval_batch_size",      HF,      "`micro_batch_size`"),
    f("per_device_batch_size",           OFTEN,   "`micro_batch_size`"),
    f("local_batch_size",                TITAN,   "`micro_batch_size`"),
    f("micro_batch_size_per_gpu",        VERL,    "`micro_batch_size`"),
    f("global_batch_size",               TITAN,   "`batch_size`"),
    f("train_batch_size",                VERL,    "`batch_size`"),
    f("effective_batch_size",            LUDWIG,  "`batch_size`"),
    f("ppo_mini_batch_size",             VERL,    "`minibatch_size`"),
    f("grad_accum",                      OFTEN,   "`gradient_accumulation_steps`"),
    f("accumulation_steps",              OFTEN,   "`gradient_accumulation_steps`"),
    f("max_seq_len",                     DSC,     "`max_length`"),
    f("max_seq_length",                  HF,      "`max_length`"),
    f("sequence_len",                    AXOLOTL, "`max_length`"),
    f("seq_len",                         TITAN,   "`max_length`"),
    f("cutoff_len",                      FACTORY, "`max_length`"),
    f("max_prompt_seq_len",              DSC,     "`max_prompt_len`"),
    f("max_prompt_length",               VERL,    "`max_prompt_len`"),
    f("max_answer_seq_len",              DSC,     "`max_new_tokens`"),
    f("max_response_length",             VERL,    "`max_new_tokens`"),
    f("max_completion_length",           HF,      "`max_new_tokens`"),
    f("num_generations",                 HF,      "`group_size`"),
    // Steps
    f("num_train_epochs",                HF,      "`num_epochs`"),
    f("total_epochs",                    VERL,    "`num_epochs`"),
    f("epochs",                          LUDWIG,  "`num_epochs`"),
    f("steps",                           TITAN,   "`max_steps`"),
    f("max_train_steps",                 OFTEN,   "`max_steps`"),
    f("eval_interval",                   DSC,     "`eval_steps`"),
    f("eval_strategy",                   HF,      "`eval_steps`"),
    f("evaluation_strategy",             HF,      "`eval_steps`"),
    f("save_freq",                       VERL,    "`save_steps`"),
    f("save_strategy",                   HF,      "`save_steps`"),
    f("log_interval",                    OFTEN,   "`logging_steps`"),
    f("max_ckpt_to_keep",                VERL,    "`save_total_limit`"),
    // Optimizer and schedule
    f("lr",                              OFTEN,   "`learning_rate`"),
    f("actor_learning_rate",             DSC,     "`actor: {learning_rate: ...}`"),
    f("critic_learning_rate",            DSC,     "`critic: {learning_rate: ...}`"),
    f("actor_weight_decay",              DSC,     "`actor: {weight_decay: ...}`"),
    f("critic_weight_decay",             DSC,     "`critic: {weight_decay: ...}`"),
    f("lr_scheduler",                    AXOLOTL, "`lr_scheduler_type`"),
    f("learning_rate_scheduler",         LUDWIG,  "`lr_scheduler_type`"),
    f("num_warmup_steps",                DSC,     "`warmup_steps`"),
    f("lr_warmup_steps",                 VERL,    "`warmup_steps`"),
    f("lr_warmup_steps_ratio",           VERL,    "`warmup_ratio`"),
    f("warmup_fraction",                 LUDWIG,  "`warmup_ratio`"),
    f("optim",                           HF,      "`optimizer`"),
    f("adam_beta1",                      HF,      "`adam_betas: [beta1, beta2]`"),
    f("adam_beta2",                      HF,      "`adam_betas: [beta1, beta2]`"),
    f("betas",                           OFTEN,   "`adam_betas`"),
    f("adam_epsilon",                    HF,      "`adam_eps`"),
    f("gradient_clipping",               "DeepSpeed's name", "`max_grad_norm`"),
    f("grad_clip",                       OFTEN,   "`max_grad_norm`"),
    f("max_norm",                        TITAN,   "`max_grad_norm`"),
    // LoRA
    f("adapter",                         AXOLOTL, "`lora_r`: setting it turns LoRA on"),
    f("finetuning_type",                 FACTORY, "`lora_r`: setting it turns LoRA on"),
    f("use_peft",                        HF,      "`lora_r`: setting it turns LoRA on"),
    f("lora_rank",                       FACTORY, "`lora_r`"),
    f("lora_dim",                        DSC,     "`lora_r`"),
    f("lora_target",                     FACTORY, "`lora_target_modules`"),
    f("lora_module_name",                DSC,     "`lora_target_modules`"),
    f("actor_lora_dim",                  DSC,     "`actor: {lora_r: ...}`"),
    f("critic_lora_dim",                 DSC,     "`critic: {lora_r: ...}`"),
    // Data
    f("datasets",                        AXOLOTL, "`data`"),
    f("dataset",                         FACTORY, "`data`"),
    f("data_path",                       DSC,     "`path` of an entry of `data`"),
    f("train_files",                     VERL,    "`path` of an entry of `data`"),
    f("val_files",                       VERL,    "`eval` of an entry of `data`"),
    f("data_split",                      DSC,     "`split` of an entry of `data`, such as `split: {sft: 2, reward: 4, ppo: 4}`"),
    f("sample_packing",                  AXOLOTL, "`packing` of a stage"),
    f("template",                        FACTORY, "`chat_template`"),
    f("val_set_size",                    AXOLOTL, "`eval` of an entry of `data`"),
    // Devices and memory
    f("stage",                           "the name of LLaMA-Factory and DeepSpeed", "an entry of `stages`, or `zero_stage` under `compile`"),
    f("deepspeed",                       HF,      "`compile: {zero_stage: ...}`"),
    f("actor_zero_stage",                DSC,     "`actor: {zero_stage: ...}`"),
    f("critic_zero_stage",               DSC,     "`critic: {zero_stage: ...}`"),
    f("offload",                         DSC,     "`offload_optimizer` and `offload_param` of a role"),
    f("offload_reference_model",         DSC,     "`ref: {offload_param: true}`"),
    f("offload_reward_model",            DSC,     "`reward: {offload_param: true}`"),
    f("enable_hybrid_engine",            DSC,     "`gather_for_generation` of a role; it is on unless it is turned off"),
    f("ds3_gather_for_generation",       "TRL's name", "`gather_for_generation` of a role"),
    f("tensor_parallel_size",            AXOLOTL, "`compile: {parallel: {tensor: ...}}`"),
    f("inference_tp_size",               DSC,     "`compile: {parallel: {tensor: ...}}`"),
    f("pipeline_parallel_degree",        TITAN,   "`compile: {parallel: {pipeline: ...}}`"),
    f("pipeline_parallel_schedule",      TITAN,   "`compile: {parallel: {schedule: ...}}`"),
    f("activation_checkpoint",           TITAN,   "`compile: {gradient_checkpointing: true}`"),
    f("enable_gradient_checkpointing",   VERL,    "`compile: {gradient_checkpointing: true}`"),
    f("activation_offloading",           HF,      "`compile: {offload_activations: true}`"),
    f("actor_gradient_checkpointing",    DSC,     "`compile: {gradient_checkpointing: true}`"),
    f("critic_gradient_checkpointing",   DSC,     "`compile: {gradient_checkpointing: true}`"),
    f("activation_memory_budget",        "PyTorch's name", "`compile: {memory: ...}`, in bytes of all memory: `2GiB`"),
    f("n_gpus_per_node",                 VERL,    "`compile: {devices: ...}`"),
    // Algorithms
    f("rl",                              AXOLOTL, "`recipe` of an entry of `stages`"),
    f("adv_estimator",                   VERL,    "`recipe` of an entry of `stages`"),
    f("init_kl_coef",                    HF,      "`kl_coef`"),
    f("target_kl",                       HF,      "`kl_target`"),
    f("ppo_target",                      FACTORY, "`kl_target`"),
    f("cliprange",                       HF,      "`clip_ratio`"),
    f("cliprange_value",                 HF,      "`clip_value`"),
    f("dpo_beta",                        OFTEN,   "`beta`"),
    f("pref_beta",                       FACTORY, "`beta`"),
    // Runs
    f("output_directory",                LUDWIG,  "`output_dir`"),
    f("dump_folder",                     TITAN,   "`output_dir`"),
    f("default_local_dir",               VERL,    "`output_dir`"),
    f("random_seed",                     LUDWIG,  "`seed`"),
];
