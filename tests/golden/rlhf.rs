//! The sections of the references behind sft: reward model, PPO, DPO and generation, by the graphs of the library's
//! recipes.
//!
//! | section | what is compared |
//! |---|---|
//! | `rm` | ten steps: losses, norms, mean end scores, accuracies; the norm of every gradient of the first |
//! | `ppo`, `ppo_eos` | the experience: log-probabilities, values, scores, advantages, returns; two steps on it, and the experience after them; norms of the first gradients |
//! | `dpo` | five steps: losses, log-probabilities under the reference; norms of the first gradients |
//! | `generate` | the greedy tokens |
//!
//! What stands at places without text, or behind the end of an answer, means nothing and is left out.

use std::collections::BTreeMap;

use dsgc_hf::Folder;
use dsgc_ir::stage::{Call, CallSteps, Generate, Operand, Statement, Update, UpdateSteps};
use dsgc_ir::{Data, Planned, StateKind, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::ranks::Member;
use dsgc_runtime::Decoder;
use dsgc_runtime::calls::{self, Named, Parts};
use safetensors::SafeTensors;
use serde_json::Value;

use super::{Compared, Golden, On, relative_error};

/// A stage in a device.
pub struct Stage {
    program: Planned,
    device: Box<dyn Device>,
    member: Member,
    taken: BTreeMap<String, i32>,
}

/// Names of the plan -> tensors.
pub type Values = Named;

impl Golden {
    /// Opens a stage of `stages.yaml`: roles of language models with the family's weights, `ref` with those of the
    /// perturbed reference where there is one, heads with the references' first values.
    pub fn stage(&self, on: On, name: &str, settings: &[&str]) -> Result<Stage, String> {
        let padding = self.scalars["about"]["num_padding_at_beginning"].as_i64().expect("it is a number");
        let mut sets = vec![format!("stages.reward.num_padding_at_beginning={padding}")];
        sets.extend(settings.iter().map(|s| format!("stages.{name}.{s}")));
        let program = self.load("stages.yaml", Some(name), sets)?;
        let (program, mut device) = on.open(program);
        let reference = self.model.with_extension("ref.safetensors");
        let reference = reference.is_file().then(|| std::fs::read(reference)).transpose().map_err(|e| e.to_string())?;
        let reference = reference.as_deref().map(SafeTensors::deserialize).transpose().map_err(|e| e.to_string())?;
        let folder = Folder::open(&self.model).map_err(|e| e.to_string())?;
        for role in &program.stage.roles {
            let wanted = |(id, name): (_, &str)| (id, (name.to_string(), program.state(id).whole_shape()));
            let (ids, wanted): (Vec<_>, Vec<_>) = program.params_of(&role.name).map(wanted).unzip();
            let read = dsgc_hf::read_params(&folder, &role.model.tensors, &wanted);
            let read = read.map_err(|e| e.iter().map(ToString::to_string).collect::<String>())?;
            for ((id, (param, _)), tensor) in ids.into_iter().zip(&wanted).zip(read) {
                let perturbed = reference.as_ref().filter(|_| role.name == "ref");
                let tensor = if let Some(reference) = perturbed {
                    let view = reference.tensor(param).map_err(|e| format!("{param}: {e}"))?;
                    let words = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")));
                    Tensor::f32(view.shape(), words.collect())
                } else {
                    // What the folder lacks is the head.
                    tensor.unwrap_or_else(|| self.tensor("fp64.rm.v_head"))
                };
                device.set_state(id, &tensor);
            }
        }
        if let Some(init) = &program.stage.init {
            device.run(init, &[]).map_err(|e| e.to_string())?;
        }
        Ok(Stage::new(program, device, on.member()))
    }

    /// Compares all sections behind sft.
    pub fn compare_stages(&self, on: On) -> Result<Vec<Compared>, String> {
        let mut all = self.reward(on)?;
        all.extend(self.ppo(on, "ppo")?);
        all.extend(self.ppo(on, "ppo_eos")?);
        all.extend(self.dpo(on)?);
        all.push(self.generated(on)?);
        all.push(Compared { what: "decode: logits beside the full forward".into(), error: self.decoding(on)? });
        Ok(all)
    }

    fn numbers(&self, section: &str, key: &str) -> Vec<f64> {
        fn flat(value: &Value, all: &mut Vec<f64>) {
            match value {
                Value::Array(items) => items.iter().for_each(|item| flat(item, all)),
                other => all.extend(other.as_f64()),
            }
        }
        let mut all = Vec::new();
        flat(&self.scalars["fp64"][section][key], &mut all);
        assert!(!all.is_empty(), "the references have no `{section}.{key}`");
        all
    }

    /// Pairs of the batch `in.rm<index>`: the first half of its rows are chosen.
    pub fn pairs(&self, index: usize) -> Values {
        let (tokens, mask) =
            (self.tensor(&format!("in.rm{index}.input_ids")), self.tensor(&format!("in.rm{index}.attention_mask")));
        let half = tokens.shape[0] / 2;
        let mut values = Values::new();
        for (name, rows) in [("chosen", 0..half), ("rejected", half..2 * half)] {
            let part = |tensor: &Tensor| {
                let part = tensor.rows(rows.clone());
                Tensor::i32(&part.shape, part.to_f64().into_iter().map(|x| x as i32).collect())
            };
            let (tokens, segment) = (part(&tokens), part(&mask));
            let trained = Tensor::bool(&tokens.shape, vec![true; tokens.len()]);
            for (member, tensor) in [("tokens", tokens), ("segment", segment), ("trained", trained)] {
                values.insert(format!("batch.{name}.{member}"), tensor);
            }
        }
        values
    }

    fn reward(&self, on: On) -> Result<Vec<Compared>, String> {
        let mut stage = self.stage(on, "reward", &["micro_batch_size=4"])?;
        let update = stage.update("reward");
        let (losses, norms) = (self.numbers("rm", "loss"), self.numbers("rm", "grad_norm_before_clip"));
        let steps: Vec<Values> = (0..losses.len()).map(|i| stage.step(&update, &self.pairs(i % 5), 1e-3)).collect();
        let found = |key: &str| -> Vec<f64> { steps.iter().map(|s| s[key].scalar()).collect() };
        let means = |key: &str| -> Vec<f64> {
            self.numbers("rm", key).chunks(4).map(|row| row.iter().sum::<f64>() / row.len() as f64).collect()
        };
        let each = |what: &str, found: Vec<f64>, reference: Vec<f64>| each("rm", what, &found, &reference);
        // A mean of scores of both signs may be near 0: the scores themselves say how much an error is.
        let scores = |what: &str, metric: &str, key: &str| {
            let largest = self.numbers("rm", key).iter().fold(0.0, |most: f64, x| most.max(x.abs()));
            Compared { what: format!("rm: {what}"), error: relative_error(&found(metric), &means(key), largest) }
        };
        let mut all = vec![
            each("losses", found("loss"), losses),
            each("norms", found("grad_norm"), norms),
            scores("chosen end scores", "chosen_score", "chosen"),
            scores("rejected end scores", "rejected_score", "rejected"),
            each("accuracies", found("accuracy"), self.numbers("rm", "accuracy")),
        ];
        let mut parts = self.stage(on, "reward", &["micro_batch_size=2"])?;
        all.push(self.gradients_of("rm", "grad_norm", &mut parts, &update.role, &self.pairs(0)));
        Ok(all)
    }

    fn ppo(&self, on: On, section: &str) -> Result<Vec<Compared>, String> {
        let tensor = |name: &str| self.tensor(&format!("fp64.{section}.{name}"));
        let mut stage = self.stage(on, "ppo", &["micro_batch_size=4"])?;
        let tokens = tensor("exp.seq");
        let (rows, width, new) = (tokens.shape[0], tokens.shape[1], 24);
        let first = width - new - 1;
        let ids = tokens.to_f64().into_iter().map(|x| x as i32).collect();
        let mut values = Values::from([
            ("rollout.tokens".to_string(), Tensor::i32(&[rows, width], ids)),
            // Only its width counts: the end of an answer is where the padding begins.
            ("rollout.answer".to_string(), Tensor::bool(&[rows, new], vec![true; rows * new])),
        ]);
        let call = stage.call();
        let experience = stage.run(&call, &values);
        let mask = tensor("exp.attention_mask");
        // Columns of answers, from a tensor of all columns; `lead` of them stand before the first.
        let answers = |t: &Tensor, lead: usize| -> Vec<f64> {
            t.to_f64().chunks(t.shape[1]).flat_map(|row| row[lead..lead + new].to_vec()).collect()
        };
        let seen: Vec<bool> = answers(&mask, first + 1).into_iter().map(|m| m == 1.0).collect();
        // One place behind the last token still counts: it carries the score.
        let live: Vec<bool> = seen
            .chunks(new)
            .flat_map(|row| {
                let n = row.iter().filter(|s| **s).count();
                (0..new).map(move |t| t <= n)
            })
            .collect();
        let at = |numbers: Vec<f64>, places: &[bool]| -> Vec<f64> {
            numbers.into_iter().zip(places).filter(|(_, p)| **p).map(|(x, _)| x).collect()
        };
        let compare = |what: &str, found: &Tensor, reference: Vec<f64>, places: &[bool]| {
            let error = relative_error(&at(found.to_f64(), places), &at(reference, places), 0.0);
            Compared { what: format!("{section}: {what}"), error }
        };
        let got = |name: &str| &experience[&format!("rows.{name}")];
        let mut all = vec![
            compare("log-probabilities", got("old_logp"), answers(&tensor("exp.logprobs"), first), &seen),
            compare("values", got("old_value"), answers(&tensor("exp.value"), first), &live),
            compare("advantages", got("advantage"), tensor("advantages").to_f64(), &live),
            compare("returns", got("returns"), tensor("returns").to_f64(), &live),
            each(
                section,
                "mean score",
                &[experience["reward"].scalar()],
                &[mean(&self.numbers(section, "reward_score"))],
            ),
            each(section, "divergence", &[experience["kl"].scalar()], &self.numbers(section, "approx_kl_to_ref")),
        ];
        for (name, tensor) in &experience {
            if let Some(member) = name.strip_prefix("rows.") {
                values.insert(format!("mini.{member}"), tensor.clone());
            }
        }
        for role in ["actor", "critic"] {
            let mut parts = self.stage(on, "ppo", &["micro_batch_size=2"])?;
            all.push(self.gradients_of(section, &format!("{role}_grad_norm"), &mut parts, role, &values));
        }
        let (actor, critic) = (stage.update("actor"), stage.update("critic"));
        let mut found: [Vec<f64>; 4] = Default::default();
        for step in 0..2 {
            let (a, c) = (stage.step(&actor, &values, 5e-4), stage.step(&critic, &values, 5e-4));
            // The actor is the one that wrote the rows, and at equal shapes nothing rounds otherwise.
            if step == 0 && a["ratio"].scalar() != 1.0 {
                return Err(format!("{section}: the first ratio is {}, not 1", a["ratio"].scalar()));
            }
            let numbers = [a["loss"].scalar(), c["loss"].scalar(), a["grad_norm"].scalar(), c["grad_norm"].scalar()];
            found.iter_mut().zip(numbers).for_each(|(list, x)| list.push(x));
        }
        let names = ["actor_loss", "critic_loss", "actor_grad_norm_before_clip", "critic_grad_norm_before_clip"];
        all.extend(
            names.iter().zip(&found).map(|(name, found)| each(section, name, found, &self.numbers(section, name))),
        );
        let after = stage.run(&call, &values);
        let logp = answers(&tensor("after2.logprobs"), first);
        all.push(compare("log-probabilities after two steps", &after["rows.old_logp"], logp, &seen));
        let value = answers(&tensor("after2.values"), first);
        all.push(compare("values after two steps", &after["rows.old_value"], value, &live));
        Ok(all)
    }

    fn dpo(&self, on: On) -> Result<Vec<Compared>, String> {
        let mut stage = self.stage(on, "dpo", &["micro_batch_size=4"])?;
        let (call, update) = (stage.call(), stage.update("policy"));
        let (mut losses, mut chosen, mut rejected) = (Vec::new(), Vec::new(), Vec::new());
        let expected = self.numbers("dpo", "loss");
        let with_reference = |stage: &mut Stage, call: &Call, i: usize| {
            let mut values = self.pairs(i % 5);
            let old = stage.run(call, &values);
            values.extend(old.into_iter().map(|(name, tensor)| (format!("old.{name}"), tensor)));
            values
        };
        // In the second batch a unit of the last layer lies so near the kink of its ReLU that single precision takes the
        // other side, and from there on the weights are others. So every step begins with the weights of doubles.
        let mut exact = self.stage(On::Doubles, "dpo", &["micro_batch_size=4"])?;
        let (exact_call, exact_update) = (exact.call(), exact.update("policy"));
        for i in 0..expected.len() {
            // What lasts from step to step; the program of a rank has more.
            let lasts = |kind| matches!(kind, StateKind::Param { .. } | StateKind::State);
            for (id, state) in stage.program.state_ids().filter(|(_, state)| lasts(state.kind)) {
                let of_exact = exact.program.state_named(&state.name).expect("it is the same stage");
                stage.device.set_state(id, &exact.device.state(of_exact));
            }
            let values = with_reference(&mut exact, &exact_call, i);
            exact.step(&exact_update, &values, 5e-4);
            let values = with_reference(&mut stage, &call, i);
            chosen.extend(values["old.ref_chosen"].to_f64());
            rejected.extend(values["old.ref_rejected"].to_f64());
            losses.push(stage.step(&update, &values, 5e-4)["loss"].scalar());
        }
        let mut all = vec![
            each("dpo", "losses", &losses, &expected),
            each("dpo", "chosen under the reference", &chosen, &self.numbers("dpo", "ref_chosen_logps")),
            each("dpo", "rejected under the reference", &rejected, &self.numbers("dpo", "ref_rejected_logps")),
        ];
        let mut parts = self.stage(on, "dpo", &["micro_batch_size=2"])?;
        let values = with_reference(&mut stage, &call, 0);
        all.push(self.gradients_of("dpo", "grad_norm", &mut parts, "policy", &values));
        Ok(all)
    }

    /// The left-padded prompts: tokens and segments, `[N, P]`.
    pub fn prompts(&self) -> (Tensor, Tensor) {
        let whole = |name: &str| {
            let tensor = self.tensor(name);
            Tensor::i32(&tensor.shape, tensor.to_f64().into_iter().map(|x| x as i32).collect())
        };
        (whole("in.ppo.prompt"), whole("in.ppo.prompt_att_mask"))
    }

    /// The left-padded prompts continued greedily: all tokens, row by row, and per step the logits after it, `[B, V]`.
    fn decoded(&self, on: On) -> Result<(Vec<Vec<i32>>, Vec<Tensor>), String> {
        let (tokens, segment) = self.prompts();
        self.stage(on, "ppo", &["micro_batch_size=4"])?.decode(&tokens, &segment)
    }

    /// Tokens of the greedy answers that differ.
    pub fn generated(&self, on: On) -> Result<Compared, String> {
        let (tokens, _) = self.decoded(on)?;
        let found: Vec<f64> = tokens.into_iter().flatten().map(f64::from).collect();
        let wrong = found.iter().zip(self.numbers("generate", "tokens")).filter(|(a, b)| **a != *b).count();
        Ok(Compared { what: "generate: tokens that differ".into(), error: wrong as f64 })
    }

    /// The largest difference of a logit of any step of decoding from the one that a forward pass over all columns
    /// gives, relative to the largest; an error if another token would follow.
    pub fn decoding(&self, on: On) -> Result<f64, String> {
        let (tokens, logits) = self.decoded(on)?;
        let (prompt, segment) = self.prompts();
        let (rows, first, width) = (tokens.len(), prompt.shape[1], tokens[0].len());
        let texts: Vec<i32> =
            ints(&segment).chunks(first).flat_map(|row| row.iter().copied().chain(vec![1; width - first])).collect();
        let whole = tokens.iter().flatten().copied().collect();
        let full = self.forward(on, &Tensor::i32(&[rows, width], whole), &Tensor::i32(&[rows, width], texts))?;
        let (vocab, full) = (full.shape[2], full.to_f64());
        let mut worst: f64 = 0.0;
        for (step, found) in logits.iter().enumerate() {
            let column = first + step;
            for (row, found) in found.to_f64().chunks(vocab).enumerate() {
                let expected = &full[(row * width + column - 1) * vocab..][..vocab];
                worst = worst.max(relative_error(found, expected, 0.0));
                let best = (0..vocab).rev().max_by(|a, b| expected[*a].total_cmp(&expected[*b]));
                if best != usize::try_from(tokens[row][column]).ok() {
                    return Err(format!(
                        "row {row}, column {column}: {} was chosen, not {best:?}",
                        tokens[row][column]
                    ));
                }
            }
        }
        Ok(worst)
    }

    /// The norms of all gradients of a batch, from a stage whose batch is cut in two: there they stand in accumulators.
    fn gradients_of(&self, section: &str, key: &str, stage: &mut Stage, role: &str, values: &Values) -> Compared {
        let update = stage.update(role);
        let UpdateSteps::Split { terms, .. } = update.steps.as_ref().expect("autodiff derived it") else {
            panic!("a batch in two parts is accumulated")
        };
        let inputs = inputs(&update.terms[0].args, values, stage);
        let graphs = Parts::of_term(&terms[0]);
        let parts = graphs.cut(&stage.program, &stage.member, &inputs);
        graphs.run(stage.device.as_mut(), &stage.program, &stage.member, &parts).unwrap_or_else(|e| panic!("{e}"));
        let references = self.scalars["fp64"][section][key].as_object().expect("norms by parameter");
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for (name, norm) in references {
            // DeepSpeed-Chat's names of a model with a head.
            let ours = match name.as_str() {
                "v_head.weight" => "score.weight".to_string(),
                name => match name.strip_prefix("rwtransformer.") {
                    Some(rest) if rest.starts_with("model.") => rest.to_string(),
                    Some(rest) => format!("model.{rest}"),
                    None => name.to_string(),
                },
            };
            let id = stage.program.state_named(&format!("{role}/{ours}.grad"));
            let id = id.unwrap_or_else(|| panic!("`{role}/{ours}` has no gradient"));
            let squares: f64 = stage.device.state(id).to_f64().iter().map(|x| x * x).sum();
            found.push(squares.sqrt());
            expected.push(norm.as_f64().expect("a norm"));
        }
        let whole = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
        let what = format!("{section}: norms of {} gradients, {role}", found.len());
        Compared { what, error: relative_error(&found, &expected, whole) }
    }
}

/// The largest error of numbers, each relative to its own reference.
fn each(section: &str, what: &str, found: &[f64], reference: &[f64]) -> Compared {
    assert_eq!(found.len(), reference.len(), "{section}: {what}");
    let error = found.iter().zip(reference).map(|(a, b)| relative_error(&[*a], &[*b], 0.0)).fold(0.0, f64::max);
    Compared { what: format!("{section}: {what}"), error }
}

fn ints(tensor: &Tensor) -> Vec<i32> {
    match &tensor.data {
        Data::I32(v) => v.clone(),
        other => panic!("found {other:?}"),
    }
}

fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len() as f64
}

/// What a graph's inputs get.
fn inputs(args: &[(String, Operand)], values: &Values, stage: &Stage) -> Named {
    let get = |operand: &Operand| match operand {
        Operand::Path(path) => values.get(path).unwrap_or_else(|| panic!("there is no `{path}`")).clone(),
        Operand::State(name) => {
            let id = stage.program.state_named(&format!("state/{name}")).expect("the recipe declares it");
            stage.device.state(id)
        }
        Operand::Number(n) => Tensor::f32(&[], vec![*n as f32]),
    };
    args.iter().map(|(input, operand)| (input.clone(), get(operand))).collect()
}

impl Stage {
    /// A stage whose weights are in the device.
    pub fn new(program: Planned, device: Box<dyn Device>, member: Member) -> Stage {
        Stage { program, device, member, taken: BTreeMap::new() }
    }

    fn find<T>(&self, wanted: impl Fn(&Statement) -> Option<T>) -> T {
        fn walk<T>(body: &[Statement], wanted: &dyn Fn(&Statement) -> Option<T>) -> Option<T> {
            body.iter().find_map(|statement| match statement {
                Statement::For { body, .. } | Statement::Repeat { body, .. } => walk(body, wanted),
                other => wanted(other),
            })
        }
        walk(&self.program.stage.plan, &wanted).expect("the plan has such a statement")
    }

    /// The update of a role.
    pub fn update(&self, role: &str) -> Update {
        self.find(|s| match s {
            Statement::Update(update) if update.role == role => Some(update.clone()),
            _ => None,
        })
    }

    /// The plan's first call of a graph.
    pub fn call(&self) -> Call {
        self.find(|s| if let Statement::Call(call) = s { Some(call.clone()) } else { None })
    }

    /// The plan's generation.
    fn generate(&self) -> Generate {
        self.find(|s| if let Statement::Generate(generate) = s { Some(generate.clone()) } else { None })
    }

    /// Continues left-padded prompts, tokens and segments `[B, P]`, greedily and up to the last column: all tokens, row by
    /// row, and per step the logits after it, `[B, V]`.
    pub fn decode(&mut self, tokens: &Tensor, segment: &Tensor) -> Result<(Vec<Vec<i32>>, Vec<Tensor>), String> {
        let generate = self.generate();
        let steps = generate.steps.expect("decode derived them");
        let mut decoder = Decoder::new(self.device.as_mut(), &self.program, &steps).map_err(|e| e.to_string())?;
        let (width, size) = (tokens.shape[1], decoder.rows());
        assert_eq!(tokens.shape[0] % size, 0, "a call decodes {size} rows");
        let (tokens, segment) = (ints(tokens), ints(segment));
        let mut all: Vec<Vec<i32>> = tokens.chunks(width).map(<[i32]>::to_vec).collect();
        let mut logits: Vec<Vec<Tensor>> = vec![Vec::new(); generate.max_new_tokens];
        for ((tokens, segment), rows) in
            tokens.chunks(size * width).zip(segment.chunks(size * width)).zip(all.chunks_mut(size))
        {
            decoder.reset();
            let (mut new, mut segment) = (tokens.to_vec(), segment.to_vec());
            for logits in &mut logits {
                let next = decoder.extend(self.device.as_mut(), &self.program, &new, &segment, [0, 0], &vec![0; size]);
                let next = next.map_err(|e| e.to_string())?;
                (new, segment) = (next.tokens, vec![1; size]);
                logits.push(next.logits);
                rows.iter_mut().zip(&new).for_each(|(row, token)| row.push(*token));
            }
        }
        let logits = logits.iter().map(|parts| joined(&parts.iter().collect::<Vec<_>>())).collect();
        Ok((all, logits))
    }

    /// Calls a graph on a batch that is one call, or on its parts.
    pub fn run(&mut self, call: &Call, values: &Values) -> Values {
        let inputs = inputs(&call.args, values, self);
        let steps = call.steps.clone().expect("autodiff derived them");
        match Parts::of_call(&steps) {
            // Joined with updates, it has the same numbers: `tests/joined.rs`.
            None => {
                assert!(matches!(steps, CallSteps::Whole | CallSteps::Joined(_)));
                calls::call(self.device.as_mut(), &self.program, &call.graph, &[&inputs])
                    .unwrap_or_else(|e| panic!("{e}"))
            }
            Some(graphs) => {
                let parts = graphs.cut(&self.program, &self.member, &inputs);
                let outputs = graphs.run(self.device.as_mut(), &self.program, &self.member, &parts);
                let outputs = outputs.unwrap_or_else(|e| panic!("{e}"));
                let mut all = outputs.whole;
                for name in outputs.rows[0].keys() {
                    let rows: Vec<&Tensor> = outputs.rows.iter().map(|part| &part[name]).collect();
                    all.insert(name.clone(), joined(&rows));
                }
                all
            }
        }
    }

    /// Takes an optimizer step on a batch that is one call.
    pub fn step(&mut self, update: &Update, values: &Values, lr: f64) -> Values {
        let taken = self.taken.entry(update.role.clone()).or_default();
        *taken += 1;
        let settings = Named::from([
            ("lr".to_string(), Tensor::f64(&[], vec![lr])),
            ("t".to_string(), Tensor::i32(&[], vec![*taken])),
        ]);
        let inputs = inputs(&update.terms[0].args, values, self);
        let device = self.device.as_mut();
        match update.steps.as_ref().expect("autodiff derived them") {
            UpdateSteps::Whole { step } => {
                calls::call(device, &self.program, step, &[&inputs, &settings]).unwrap_or_else(|e| panic!("{e}"))
            }
            UpdateSteps::Split { terms, apply, .. } => {
                let graphs = Parts::of_term(&terms[0]);
                let parts = graphs.cut(&self.program, &self.member, &inputs);
                let mut outputs =
                    graphs.run(device, &self.program, &self.member, &parts).unwrap_or_else(|e| panic!("{e}")).whole;
                let applied = calls::call(device, &self.program, apply, &[&settings]);
                outputs.extend(applied.unwrap_or_else(|e| panic!("{e}")));
                outputs
            }
        }
    }
}

/// Rows of parts, one after the other.
fn joined(parts: &[&Tensor]) -> Tensor {
    let rows = parts.iter().map(|t| t.shape[0]).sum();
    let shape = [&[rows], &parts[0].shape[1..]].concat();
    let numbers = parts.iter().flat_map(|t| t.to_f64());
    match parts[0].data {
        Data::I32(_) => Tensor::i32(&shape, numbers.map(|x| x as i32).collect()),
        Data::Bool(_) => Tensor::bool(&shape, numbers.map(|x| x != 0.0).collect()),
        _ => Tensor::f64(&shape, numbers.collect()),
    }
}
