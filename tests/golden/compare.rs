//! Reference numbers of PyTorch beside those of a device.
//!
//! A folder holds, for each family, a Hugging Face folder `FAMILY/`, tensors in `FAMILY.safetensors` and scalars in
//! `FAMILY.json`. All references are in doubles (`fp64.`), from the same weights in single precision and on the same
//! rows of tokens (`in.sft0` to `in.sft3`, drawn in turn). What is compared:
//!
//! | what | relative to |
//! |---|---|
//! | logits of the first batch, where there is text | the largest logit |
//! | the loss and every gradient of the first batch | the largest element or the norm of the whole gradient |
//! | 20 losses and norms at a constant rate; with clipping, warm-up and cosine | each its own reference |
//! | every parameter after the 20 steps at a constant rate | as gradients |
//!
//! References may lack the section `sft`: then logits are all that is compared of this table.
//!
//! The stages behind sft are compared by [`rlhf`].
//!
//! The gradient of OPT's `k_proj.bias` is zero in exact arithmetic, since softmax does not see what is added to all
//! keys; AdamW makes steps of full size out of its rounding errors, so it is left out after steps.

#[path = "rlhf.rs"]
pub mod rlhf;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use dsgc_hf::{Folder, read_params};
use dsgc_ir::diag::Diag;
use dsgc_ir::schedule::PipelineOrder;
use dsgc_ir::stage::{Operands, Statement, TermSteps, UpdateSteps};
use dsgc_ir::{Axis, Placement, Planned, Program, StateId, StateKind, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use dsgc_kernels::cube::{Platform, open, target};
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_kernels::ranks::{Member, pack, unpack};
use dsgc_passes::PassContext;
use dsgc_runtime::calls::{self, Named, Parts};
use dsgc_runtime::{in_pieces, learning_rate};
use dsgc_yaml::load::{self, Failed, FolderModel, Host, Options, TokenizerFacts};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value};

/// Batches that the references draw in turn.
const BATCHES: u64 = 4;
/// The pipelines beside this file. They are in the program, so that it runs where this file is not.
const PIPELINES: [(&str, &str); 2] =
    [("pipeline.yaml", include_str!("pipeline.yaml")), ("stages.yaml", include_str!("stages.yaml"))];
/// Parameters without a comparison after steps.
pub const ZERO_GRADIENT: &str = "k_proj.bias";

/// What runs the programs.
#[derive(Clone, Copy)]
pub enum On<'a> {
    /// The interpreter in doubles.
    Doubles,
    /// The CPU with so many threads.
    Cpu(usize),
    /// A rank of several, each of which compares everything, with one of these.
    Rank(&'a Rank),
    /// A GPU, or what Vulkan gives for one.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    Gpu(Platform),
}

/// A rank of several, as which a device runs.
pub struct Rank {
    /// The rank among the others.
    pub member: Member,
    /// What ranks along `data` share out.
    pub zero_stage: u8,
    /// In which order ranks along `pipeline` work.
    pub order: PipelineOrder,
    /// The CPU with so many threads; the interpreter in doubles otherwise.
    pub threads: Option<usize>,
}

impl fmt::Debug for On<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            On::Doubles => f.write_str("the interpreter in doubles"),
            On::Cpu(threads) => write!(f, "the CPU with {threads} threads"),
            On::Rank(rank) => {
                let Rank { member, zero_stage, order, .. } = rank;
                write!(f, "{:?} as ranks {}, zero_stage {zero_stage}, {}", rank.alone(), member.mesh, order.name())
            }
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            On::Gpu(platform) => f.write_str(platform.name()),
        }
    }
}

impl Rank {
    /// The same without others.
    fn alone(&self) -> On<'static> {
        self.threads.map_or(On::Doubles, On::Cpu)
    }
}

impl On<'_> {
    /// The largest relative error allowed: doubles may differ in the order of sums, singles in their rounding.
    pub fn tolerance(self) -> f64 {
        match self {
            On::Doubles => 1e-8,
            On::Cpu(_) => 1e-4,
            On::Rank(rank) => rank.alone().tolerance(),
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            On::Gpu(_) => 1e-4,
        }
    }

    /// The rank as which programs run.
    pub fn member(self) -> Member {
        if let On::Rank(rank) = self { rank.member.clone() } else { Member::alone() }
    }

    /// A device with the program in it. States go in and out of it whole.
    pub fn open(self, mut program: Program) -> (Planned, Box<dyn Device>) {
        if let On::Rank(rank) = self {
            program.mesh = rank.member.mesh;
            program.place = program.mesh.place(Axis::Pipeline, rank.member.rank());
            program.stage.parallel.order = rank.order;
            program.stage.parallel.virtual_stages = if rank.order == PipelineOrder::Interleaved { 2 } else { 1 };
            program.stage.roles.iter_mut().for_each(|role| role.zero_stage = rank.zero_stage);
        }
        let compile = |target| dsgc_passes::compile(program, &PassContext::new(target), &mut |_| {});
        let planned = match self {
            On::Doubles | On::Rank(Rank { threads: None, .. }) => compile(&InterpTarget),
            On::Cpu(threads) | On::Rank(&Rank { threads: Some(threads), .. }) => compile(&CpuTarget { threads }),
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            On::Gpu(platform) => compile(&target(platform)),
        };
        let planned = planned.unwrap_or_else(|e| panic!("{}", e.iter().map(|d| d.to_string()).collect::<String>()));
        let device: Box<dyn Device> = match self {
            On::Doubles => Box::new(Interp::planned(planned.clone(), Precision::F64)),
            On::Cpu(threads) => Box::new(Cpu::new(planned.clone(), threads)),
            On::Rank(rank) => Box::new(Whole::new(planned.clone(), rank)),
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            On::Gpu(platform) => {
                open(platform, planned.clone(), Member::alone(), None).unwrap_or_else(|e| panic!("{}", e.message))
            }
        };
        (planned, device)
    }
}

/// The device of a rank, into which states go whole and out of which they come whole.
struct Whole {
    device: Box<dyn Device>,
    program: Planned,
    member: Member,
}

impl Whole {
    fn new(program: Planned, rank: &Rank) -> Whole {
        let member = rank.member.clone();
        let device: Box<dyn Device> = match rank.threads {
            None => Box::new(Interp::planned(program.clone(), Precision::F64).as_member(member.clone())),
            Some(threads) => Box::new(Cpu::new(program.clone(), threads).as_member(member.clone())),
        };
        Whole { device: in_pieces(device, &program, &member), program, member }
    }
}

impl Device for Whole {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn set_state(&mut self, id: StateId, value: &Tensor) {
        for id in [id].into_iter().chain(self.program.copies_of(id)) {
            match &self.program.state(id).placement {
                Some(placement) => {
                    self.device.set_part(id, &placement.part(&self.member.mesh, self.member.rank(), value));
                }
                None => self.device.set_part(id, value),
            }
        }
    }

    fn set_part(&mut self, id: StateId, value: &Tensor) {
        self.device.set_part(id, value);
    }

    /// All ranks ask for a state together. One that is a sum over ranks is added up, as is a gradient to which several places
    /// along `pipeline` add.
    fn state(&self, id: StateId) -> Tensor {
        let (own, state, mesh) = (self.device.state(id), self.program.state(id), &self.member.mesh);
        let is_said = state.placement.as_ref().is_some_and(|p| p.partial == Some(Axis::Pipeline));
        let is_added_up = state.kind == StateKind::Scratch && mesh.pipeline > 1 && !is_said;
        if state.placement.is_none() && !is_added_up {
            return own;
        }
        let placement = state.placement.clone().unwrap_or_else(|| Placement::of_whole(own.shape.clone()));
        let parts = self.member.all().messages(&pack(&own)).unwrap_or_else(|e| panic!("{e}"));
        let parts: Vec<Tensor> = parts.iter().map(|part| unpack(part).0).collect();
        // The ranks that have a summand, as places along an axis.
        let along = |axis: Axis| (0..mesh.size(axis)).map(|at| Some((axis, at))).collect();
        let ways: Vec<Option<(Axis, usize)>> = placement.partial.map_or(vec![None], along);
        let places: Vec<Option<(Axis, usize)>> = match is_added_up {
            true => {
                along(Axis::Pipeline).into_iter().filter(|way| way.is_some_and(|(_, at)| placement.is_at(at))).collect()
            }
            false => vec![None],
        };
        let there = |rank: usize, way: Option<(Axis, usize)>| way.map_or(rank, |(axis, at)| mesh.group(axis, rank)[at]);
        let mut summands: Vec<Tensor> = Vec::new();
        for way in ways {
            for &place in &places {
                let of_rank = |rank: usize| parts[there(there(rank, way), place)].clone();
                summands.push(placement.whole(mesh, &(0..mesh.ranks()).map(of_rank).collect::<Vec<Tensor>>()));
            }
        }
        if summands.len() == 1 {
            return summands.swap_remove(0);
        }
        let mut sum = vec![0.0; summands[0].len()];
        for summand in &summands {
            sum.iter_mut().zip(summand.to_f64()).for_each(|(sum, x)| *sum += x);
        }
        Tensor::f64(&summands[0].shape, sum)
    }

    fn run(&mut self, graph: &str, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>, Diag> {
        self.device.run(graph, inputs)
    }
}

/// The references of a family.
pub struct Golden {
    model: PathBuf,
    tensors: Vec<u8>,
    scalars: Value,
}

/// A comparison: what, and its largest relative error.
pub struct Compared {
    /// What was compared.
    pub what: String,
    /// The largest relative error in it.
    pub error: f64,
}

/// A stage in a device, with its weights.
pub struct Trainer {
    program: Planned,
    device: Box<dyn Device>,
    member: Member,
    steps: UpdateSteps,
    args: Operands,
    taken: u64,
}

impl Golden {
    /// Opens the references of a family in a folder.
    pub fn open(folder: &Path, family: &str) -> io::Result<Golden> {
        let file = |ending: &str| folder.join(format!("{family}.{ending}"));
        let scalars = serde_json::from_slice(&fs::read(file("json"))?)?;
        Ok(Golden { model: folder.join(family), tensors: fs::read(file("safetensors"))?, scalars })
    }

    /// Whether the references have losses, gradients and parameters of sft.
    pub fn has_sft(&self) -> bool {
        self.scalars["fp64"]["sft"].is_object()
    }

    /// Compares logits, and sft where the references have it. An error is what users would see: the family is not known,
    /// say.
    pub fn compare(&self, on: On) -> Result<Vec<Compared>, String> {
        let mut all = vec![self.logits(on)?];
        if !self.has_sft() {
            return Ok(all);
        }
        all.extend(self.gradients(on)?);
        all.extend(self.training(on, "adamw_const_lr", &[])?);
        let clipped = ["max_grad_norm=1.0", "warmup_steps=5", "lr_scheduler_type=cosine"];
        all.extend(self.training(on, "adamw_cosine_clip1", &clipped)?);
        Ok(all)
    }

    /// Logits of the family's model on whole rows: tokens and segments `[B, T]`.
    pub fn forward(&self, on: On, tokens: &Tensor, segment: &Tensor) -> Result<Tensor, String> {
        let machine = self.machine();
        let model = FolderModel::open(&self.model, &machine).map_err(explained)?;
        let program = model.score(tokens.shape[0], tokens.shape[1]).map_err(explained)?;
        let (program, mut device) = on.open(program);
        load_weights(&program, device.as_mut(), &self.model);
        let outputs = device.run("score", &[("tokens", tokens), ("segment", segment)]).map_err(|e| e.to_string())?;
        Ok(outputs.into_iter().find(|(name, _)| name == "logits").expect("`score` gives logits").1)
    }

    /// Logits of the first batch.
    pub fn logits(&self, on: On) -> Result<Compared, String> {
        let (batch, reference) = (self.batch(0), self.tensor("fp64.forward.logits"));
        let rows = reference.shape[0];
        let (tokens, segment) = (batch["text.tokens"].rows(0..rows), batch["text.segment"].rows(0..rows));
        let logits = self.forward(on, &tokens, &segment)?;
        // Scores on padding mean nothing: a model may see whatever it likes there.
        let vocab = reference.shape[2];
        let text = |tensor: &Tensor| -> Vec<f64> {
            let places = segment.to_f64().into_iter();
            tensor.to_f64().chunks(vocab).zip(places).filter(|(_, s)| *s == 1.0).flat_map(|(l, _)| l.to_vec()).collect()
        };
        Ok(Compared { what: "logits".into(), error: relative_error(&text(&logits), &text(&reference), 0.0) })
    }

    /// The loss and every gradient of the first batch.
    pub fn gradients(&self, on: On) -> Result<Vec<Compared>, String> {
        // In halves, so that gradients stand in their accumulators.
        let mut trainer = self.trainer(on, &["micro_batch_size=2"])?;
        let loss = trainer.backward(&self.batch(0));
        let whole = self.scalars["fp64"]["sft"]["grad_norm_total"].as_f64().expect("the norm of all gradients");
        let expected = self.scalars["fp64"]["sft"]["loss"].as_f64().expect("the first loss");
        let mut all = vec![Compared { what: "first loss".into(), error: relative_error(&[loss], &[expected], 0.0) }];
        for (name, gradient) in trainer.tensors(".grad") {
            let reference = self.tensor(&format!("fp64.sft.grad.{name}"));
            let error = relative_error(&gradient.to_f64(), &reference.to_f64(), whole);
            all.push(Compared { what: format!("gradient of {name}"), error });
        }
        Ok(all)
    }

    fn training(&self, on: On, name: &str, settings: &[&str]) -> Result<Vec<Compared>, String> {
        let reference = &self.scalars["fp64"]["sft"][name];
        let list = |key: &str| -> Vec<f64> {
            reference[key].as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
        };
        let (losses, norms) = (list("loss"), list("grad_norm_before_clip"));
        let mut trainer = self.trainer(on, settings)?;
        let mut error: f64 = 0.0;
        for (step, (loss, norm)) in losses.iter().zip(&norms).enumerate() {
            let found = trainer.step(&self.batch(step as u64 % BATCHES));
            error = error.max(relative_error(&[found.loss], &[*loss], 0.0));
            error = error.max(relative_error(&[found.grad_norm], &[*norm], 0.0));
        }
        let mut all = vec![Compared { what: format!("{} losses and norms, {name}", losses.len()), error }];
        if name == "adamw_const_lr" {
            let whole = *norms.last().expect("there are steps");
            for (name, param) in trainer.tensors("").into_iter().filter(|(n, _)| !n.ends_with(ZERO_GRADIENT)) {
                let reference = self.tensor(&format!("fp64.sft.after20.{name}"));
                let error = relative_error(&param.to_f64(), &reference.to_f64(), whole);
                all.push(Compared { what: format!("{name} after {} steps", losses.len()), error });
            }
        }
        Ok(all)
    }

    /// The stage `sft` of `pipeline.yaml` with this family's model.
    pub fn trainer(&self, on: On, settings: &[&str]) -> Result<Trainer, String> {
        let sets = settings.iter().map(|s| format!("stages.sft.{s}")).collect();
        let program = self.load("pipeline.yaml", None, sets)?;
        let (program, mut device) = on.open(program);
        load_weights(&program, device.as_mut(), &self.model);
        let Some(Statement::For { body, .. }) = program.stage.plan.first() else { panic!("sft goes through rows") };
        let Some(Statement::Update(update)) = body.first() else { panic!("sft updates its model") };
        let (steps, args) = (update.steps.clone().expect("autodiff derived the update"), update.terms[0].args.clone());
        Ok(Trainer { program, device, member: on.member(), steps, args, taken: 0 })
    }

    /// A stage of a pipeline beside this file, with this family's model.
    fn load(&self, file: &str, stage: Option<&str>, mut sets: Vec<String>) -> Result<Program, String> {
        sets.push(format!("models.base={}", self.model.display()));
        let file = Path::new("tests/golden").join(file);
        let options = Options { sets, stage: stage.map(String::from), ..Options::default() };
        let loaded = load::load(&file, &options, &self.machine()).map_err(explained)?;
        let [program] = <[Program; 1]>::try_from(loaded.stages).expect("one stage is asked for");
        Ok(program)
    }

    fn machine(&self) -> Machine {
        Machine { pad: self.scalars["about"]["pad_token_id"].as_i64().map(|pad| pad as i32) }
    }

    /// Rows of tokens, as the runtime makes them from files: `text.tokens`, `text.segment`, `text.trained`.
    pub fn batch(&self, index: u64) -> Named {
        let part = |name: &str| self.tensor(&format!("in.sft{index}.{name}"));
        let (tokens, mask, labels) = (part("input_ids"), part("attention_mask"), part("labels"));
        let whole = |tensor: &Tensor| -> Vec<i32> { tensor.to_f64().into_iter().map(|x| x as i32).collect() };
        // Hugging Face's labels are tokens, or -100 where a token is no target.
        let trained = labels.to_f64().into_iter().map(|x| x != -100.0).collect();
        Named::from([
            ("text.tokens".into(), Tensor::i32(&tokens.shape, whole(&tokens))),
            ("text.segment".into(), Tensor::i32(&mask.shape, whole(&mask))),
            ("text.trained".into(), Tensor::bool(&labels.shape, trained)),
        ])
    }

    /// A tensor of the file, numbers as doubles.
    fn tensor(&self, name: &str) -> Tensor {
        let file = SafeTensors::deserialize(&self.tensors).expect("the references are a safetensors file");
        let view = file.tensor(name).unwrap_or_else(|_| panic!("the references have no `{name}`"));
        let words = view.data().chunks_exact(8).map(|bytes| <[u8; 8]>::try_from(bytes).expect("8 bytes"));
        let numbers: Vec<f64> = match view.dtype() {
            Dtype::F64 => words.map(f64::from_le_bytes).collect(),
            Dtype::I64 => words.map(|word| i64::from_le_bytes(word) as f64).collect(),
            other => panic!("`{name}` is of the type {other:?}"),
        };
        Tensor::f64(view.shape(), numbers)
    }
}

/// Numbers of an optimizer step.
pub struct Step {
    /// The loss before it.
    pub loss: f64,
    /// The norm of the whole gradient, before clipping.
    pub grad_norm: f64,
}

impl Trainer {
    /// Takes an optimizer step.
    pub fn step(&mut self, batch: &Named) -> Step {
        let stage = &self.program.stage;
        let total = stage.max_steps.expect("the pipeline says how many steps there are");
        let lr = learning_rate(&stage.trainings[0].schedule, self.taken, total);
        self.taken += 1;
        let settings = Named::from([
            ("lr".to_string(), Tensor::f64(&[], vec![lr])),
            ("t".to_string(), Tensor::i32(&[], vec![self.taken as i32])),
        ]);
        let inputs = self.inputs(batch);
        let outputs = match self.steps.clone() {
            UpdateSteps::Whole { step } => self.call(&step, &[&inputs, &settings]),
            UpdateSteps::Split { terms, apply, .. } => {
                let mut outputs = self.term(&terms[0], &inputs);
                outputs.extend(self.call(&apply, &[&settings]));
                outputs
            }
        };
        Step { loss: outputs["loss"].scalar(), grad_norm: outputs["grad_norm"].scalar() }
    }

    /// Adds the gradients of a batch to their accumulators, and gives its loss.
    fn backward(&mut self, batch: &Named) -> f64 {
        let UpdateSteps::Split { terms, .. } = self.steps.clone() else {
            panic!("a batch in two parts is accumulated")
        };
        let inputs = self.inputs(batch);
        self.term(&terms[0], &inputs)["loss"].scalar()
    }

    /// Runs the graphs of a loss on all parts of a batch.
    fn term(&mut self, steps: &TermSteps, inputs: &Named) -> Named {
        let graphs = Parts::of_term(steps);
        let parts = graphs.cut(&self.program, &self.member, inputs);
        graphs.run(self.device.as_mut(), &self.program, &self.member, &parts).unwrap_or_else(|e| panic!("{e}")).whole
    }

    fn call(&mut self, graph: &str, given: &[&Named]) -> Named {
        calls::call(self.device.as_mut(), &self.program, graph, given).unwrap_or_else(|e| panic!("{e}"))
    }

    fn inputs(&self, batch: &Named) -> Named {
        self.args.iter().map(|(input, _)| (input.clone(), batch[input].clone())).collect()
    }

    /// Parameters by Hugging Face name, or with `.grad` their accumulated gradients.
    pub fn tensors(&self, suffix: &str) -> BTreeMap<String, Tensor> {
        let params = self.program.params_of("model");
        params
            .map(|(_, name)| {
                let id = self.program.state_named(&format!("model/{name}{suffix}"));
                (name.to_string(), self.device.state(id.expect("every parameter is trained")))
            })
            .collect()
    }
}

/// The largest difference, relative to the largest reference or to `least`, whichever is more.
///
/// What is not a number differs without bound.
pub fn relative_error(found: &[f64], reference: &[f64], least: f64) -> f64 {
    assert_eq!(found.len(), reference.len(), "as many numbers as references");
    let scale = reference.iter().fold(least, |most, x| most.max(x.abs()));
    let worst = |most: f64, difference: f64| if difference.is_nan() { f64::INFINITY } else { most.max(difference) };
    let difference = found.iter().zip(reference).map(|(a, b)| (a - b).abs()).fold(0.0, worst);
    if difference == 0.0 { 0.0 } else { difference / scale }
}

fn load_weights(program: &Planned, device: &mut dyn Device, folder: &Path) {
    let role = &program.stage.roles[0];
    let (ids, wanted): (Vec<_>, Vec<_>) = program
        .params_of(&role.name)
        .map(|(id, name)| (id, (name.to_string(), program.state(id).whole_shape())))
        .unzip();
    let read = Folder::open(folder).map_err(|e| vec![e]).and_then(|f| read_params(&f, &role.model.tensors, &wanted));
    let tensors = read.unwrap_or_else(|e| panic!("{}", e.iter().map(|d| d.to_string()).collect::<String>()));
    for (id, tensor) in ids.into_iter().zip(tensors) {
        let tensor = tensor.expect("no parameter may be new");
        device.set_state(id, &tensor);
    }
}

fn explained(failed: Failed) -> String {
    failed.diags.iter().map(|d| d.plain(&failed.sources)).collect()
}

/// The disk, with a file of rows that nobody reads: the references bring their tokens.
struct Machine {
    /// The padding with which the references were made, whatever the tokenizer's is.
    pad: Option<i32>,
}

impl Host for Machine {
    fn text(&self, path: &Path) -> io::Result<String> {
        let own = PIPELINES.iter().find(|(name, _)| path == Path::new("tests/golden").join(name));
        own.map_or_else(|| fs::read_to_string(path), |(_, text)| Ok(text.to_string()))
    }

    fn hf_config(&self, folder: &Path) -> Result<Map<String, Value>, Diag> {
        Folder::open(folder).map(|f| f.config().clone())
    }

    fn tokenizer(&self, folder: &Path) -> Result<TokenizerFacts, Diag> {
        let t = dsgc_hf::Tokenizer::load(folder)?;
        Ok(TokenizerFacts { vocab: t.vocab_size(), pad: self.pad.or(t.pad()), eos: t.eos(), bos: t.bos() })
    }

    fn columns(&self, _: &Path) -> Result<Vec<String>, Diag> {
        Ok(["text", "prompt", "chosen", "rejected"].map(String::from).into())
    }
}
