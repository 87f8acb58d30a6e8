//! Mixed precision: where a role asks for bf16 or fp16, its model computes in it what gains by it.
//!
//! ```text
//! %w = read @model/w : f32[8, 4]                  %c = cast %w dtype=bf16
//! %y = contract %x, %w spec=bt,vt->bv     =>      %d = cast %x dtype=bf16
//!                                                 %y = contract %d, %c spec=bt,vt->bv:f32
//! ```
//!
//! What is narrow follows PyTorch's autocast: products and attention take narrow operands and sum in f32; norms, exponentials,
//! logarithms, reductions, losses and the optimizer are f32. In between, a value is narrow where it *can* be, since it comes
//! from a product, and where somebody *wants* it so, a product, attention or [`Op::TokenLogp`]. So what flows from
//! layer to layer stays f32, as every layer adds to it: rounding it would lose what small layers add, and it is read by
//! norms. Between products that follow each other (`relu` in a block, rotations before attention, logits before the loss) bytes
//! are halved. A product whose result nobody wants narrow gives f32 and is never rounded.
//!
//! Parameters stay f32, and their gradients: a product reads a parameter through a cast, whose gradient `autodiff`
//! takes unrounded; that no graph casts them anew in every call is the work of `copies`. Rows of tables are looked up narrow
//! for all roles of one precision, so that a frozen or copied model computes the bits of the trained one.
//! Keys and values of earlier columns, which are states, become narrow with what is written to them.
//!
//! Where no role asks for it, the program stays as it is.

use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;
use dsgc_ir::infer::Contraction;
use dsgc_ir::{Builder, DType, Graph, Op, OpData, Program, Site, StateId, StateKind, Value};

use crate::canonicalize::constant;
use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};

/// The pass.
pub const PASS: Pass = Pass {
    name: "precision",
    requires: &[Fact::Typed, Fact::Adapted],
    provides: &[],
    numerics: Numerics::AsAsked,
    run,
};

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    if program.stage.roles.iter().all(|role| role.precision.is_none()) {
        return Ok(program);
    }
    let plans: Vec<Plan> = program.graphs.iter().map(|graph| Plan::new(graph, &program)).collect();
    for (state, dtype) in narrow_states(&program, &plans) {
        program.states[state.0 as usize].ty.dtype = dtype;
    }
    let graphs = program.graphs.iter().zip(&plans).map(|(graph, plan)| {
        for (_, op) in graph.ops() {
            if let (Policy::Product | Policy::Attention, Some(dtype)) = (policy(&op.op), plan.computes(op)) {
                context.matched(&format!("{} in {dtype}", op.op.name()), 1);
            }
        }
        Narrowing { program: &program, plan, rebuild: Rebuild::same(graph), casts: BTreeMap::new() }.graph()
    });
    program.graphs = graphs.collect();
    Ok(program)
}

/// What an op does with narrow floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    /// Takes them, sums in f32, and gives what is wanted.
    Product,
    /// Takes them and gives them, and is f32 inside.
    Attention,
    /// Looks up rows of a table as they are.
    Lookup,
    /// Gives them where its operands are narrow.
    Follows,
    /// Takes them as they are, and gives f32.
    Reads,
    /// Takes and gives f32.
    Wide,
}

/// The policy, as PyTorch's autocast has it for what it lists; all else follows its operands.
fn policy(op: &Op) -> Policy {
    match op {
        Op::Contract { .. } => Policy::Product,
        Op::Attention { .. } | Op::CachedAttention { .. } => Policy::Attention,
        Op::Embed {} => Policy::Lookup,
        Op::TokenLogp {} | Op::ReduceSum { .. } => Policy::Reads,
        Op::Broadcast { .. }
        | Op::Reshape { .. }
        | Op::Transpose { .. }
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Concat { .. }
        | Op::SliceAt { .. }
        | Op::WriteAt { .. }
        | Op::Stop {}
        | Op::Dropout { .. }
        | Op::Add {}
        | Op::Sub {}
        | Op::Mul {}
        | Op::Max {}
        | Op::Min {}
        | Op::Neg {}
        | Op::Abs {}
        | Op::Tanh {}
        | Op::Sigmoid {}
        | Op::Relu {}
        | Op::Gelu {}
        | Op::GeluTanh {}
        | Op::Silu {}
        | Op::Where {}
        | Op::Rope { .. } => Policy::Follows,
        // Constants and states are what their users make of them.
        Op::Const { .. } | Op::Size { .. } | Op::Iota { .. } | Op::Read { .. } | Op::Write { .. } => Policy::Wide,
        // A number becomes another type, or the answer of a comparison: it should be the number that it is.
        Op::Cast { .. } | Op::Eq {} | Op::Ne {} | Op::Lt {} | Op::Le {} => Policy::Wide,
        Op::And {} | Op::Or {} | Op::Not {} => Policy::Wide,
        // They magnify what was rounded, or have a range that narrow floats lack.
        Op::Div {} | Op::Pow {} | Op::Exp {} | Op::Log {} | Op::Sqrt {} | Op::LogSigmoid {} | Op::Erf {} => {
            Policy::Wide
        }
        Op::ReduceMax { .. } | Op::ReduceMin { .. } | Op::Cumsum { .. } | Op::Recurrence { .. } => Policy::Wide,
        Op::LayerNorm { .. } | Op::RmsNorm { .. } => Policy::Wide,
        Op::Sample { .. } | Op::PositionIn {} | Op::Fold { .. } => Policy::Wide,
        Op::RandomNormal { .. } | Op::RandomUniform { .. } | Op::RowUniform { .. } => Policy::Wide,
        // Derived later than this pass.
        Op::Fused { .. }
        | Op::EmbedGrad { .. }
        | Op::LayerNormGrad { .. }
        | Op::RmsNormGrad { .. }
        | Op::AttentionGrad { .. }
        | Op::TokenLogpGrad {}
        | Op::ContractEach { .. }
        | Op::ContractFused { .. }
        | Op::SumSquares {}
        | Op::AddRows {}
        | Op::HeadLogp {}
        | Op::HeadLogpGrad { .. }
        | Op::AllReduce { .. }
        | Op::AllGather { .. }
        | Op::ReduceScatter { .. }
        | Op::Wait {}
        | Op::ToHost {}
        | Op::FromHost {}
        | Op::Shard { .. }
        | Op::Adamw { .. } => Policy::Wide,
    }
}

/// How a value came to be, as far as narrow floats go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nature {
    /// No float, or one of full width.
    Plain,
    /// A number that is known, or a state that is no parameter: it takes the width of what it meets.
    Free,
    /// A parameter, or its elements in another order, of a role that computes in this type.
    Param(DType),
    /// It can be of this type without a cast.
    Can(DType),
}

/// What becomes of the values of a graph.
struct Plan {
    nature: Vec<Nature>,
    /// Values that somebody takes narrow.
    wanted: Vec<bool>,
}

impl Plan {
    fn new(graph: &Graph, program: &Program) -> Plan {
        let mut plan =
            Plan { nature: vec![Nature::Plain; graph.values().len()], wanted: vec![false; graph.values().len()] };
        for (_, op) in graph.ops() {
            for (i, result) in op.results().enumerate() {
                // Of attention, only the first result.
                if graph.ty(result).dtype == DType::F32 && i == 0 {
                    plan.nature[result.0 as usize] = plan.nature_of(graph, program, op);
                }
            }
        }
        for (_, op) in graph.ops().rev() {
            let takes = match policy(&op.op) {
                Policy::Product | Policy::Attention | Policy::Lookup => plan.computes(op).is_some(),
                Policy::Follows => op.results().any(|r| plan.narrow(r).is_some()),
                Policy::Reads => matches!(op.op, Op::TokenLogp {}),
                Policy::Wide => false,
            };
            if takes {
                op.args.iter().for_each(|a| plan.wanted[a.0 as usize] = true);
            }
        }
        plan
    }

    fn get(&self, value: Value) -> Nature {
        self.nature[value.0 as usize]
    }

    fn nature_of(&self, graph: &Graph, program: &Program, op: &OpData) -> Nature {
        if let Op::Read { state } = op.op {
            return match program.state(state).kind {
                StateKind::Param { .. } | StateKind::Copy { .. } => {
                    asked(program, state).map_or(Nature::Plain, Nature::Param)
                }
                StateKind::State | StateKind::Scratch | StateKind::Generation => Nature::Free,
            };
        }
        if constant(graph, op.results().next().expect("it has a result")).is_some() {
            return Nature::Free;
        }
        match policy(&op.op) {
            Policy::Product | Policy::Attention | Policy::Lookup => {
                self.computes(op).map_or(Nature::Plain, Nature::Can)
            }
            Policy::Follows => self.follows(graph, op),
            Policy::Reads | Policy::Wide => Nature::Plain,
        }
    }

    /// What the elementwise and structural ops make of their operands.
    fn follows(&self, graph: &Graph, op: &OpData) -> Nature {
        let rope = matches!(op.op, Op::Rope { .. });
        // Frequencies are f32 always.
        let args = if rope { &op.args[..1] } else { &op.args[..] };
        let floats = args.iter().filter(|a| graph.ty(**a).dtype == DType::F32);
        let mut all = Nature::Free;
        for nature in floats.map(|&a| self.get(a)) {
            all = match (all, nature) {
                (Nature::Plain, _) | (_, Nature::Plain) => return Nature::Plain,
                (same, Nature::Free) | (Nature::Free, same) => same,
                (Nature::Param(a) | Nature::Can(a), Nature::Param(b) | Nature::Can(b)) if a != b => {
                    return Nature::Plain;
                }
                (Nature::Param(a), Nature::Param(_)) => Nature::Param(a),
                (Nature::Param(a) | Nature::Can(a), _) => Nature::Can(a),
            };
        }
        all
    }

    /// The type in which a product, attention or lookup computes, if it is a narrow one: that of a parameter among its
    /// operands, or of all of them.
    fn computes(&self, op: &OpData) -> Option<DType> {
        let operands = match policy(&op.op) {
            Policy::Product => 2,
            Policy::Attention => 3,
            Policy::Lookup => 1,
            Policy::Follows | Policy::Reads | Policy::Wide => return None,
        };
        let natures: Vec<Nature> = op.args[..operands].iter().map(|&a| self.get(a)).collect();
        let of_params: Vec<DType> = natures
            .iter()
            .filter_map(|nature| match nature {
                Nature::Param(dtype) => Some(*dtype),
                _ => None,
            })
            .collect();
        let all: Vec<DType> = natures
            .iter()
            .filter_map(|nature| match nature {
                Nature::Param(dtype) | Nature::Can(dtype) => Some(*dtype),
                Nature::Plain | Nature::Free => None,
            })
            .collect();
        let &first = all.first()?;
        // The columns of a cache are states, and become what is written to them.
        let free = natures.iter().filter(|n| **n == Nature::Free).count();
        let decided = !of_params.is_empty() || all.len() + free == operands;
        (decided && all.iter().all(|&dtype| dtype == first)).then_some(first)
    }

    /// The type of a value if it becomes a narrow one.
    fn narrow(&self, value: Value) -> Option<DType> {
        match self.get(value) {
            Nature::Can(dtype) if self.wanted[value.0 as usize] => Some(dtype),
            _ => None,
        }
    }
}

/// The narrow type that the role of a parameter computes in.
fn asked(program: &Program, param: StateId) -> Option<DType> {
    let name = &program.state(param).name;
    let of = |role: &str| name.strip_prefix(role).is_some_and(|rest| rest.starts_with('/'));
    program.stage.roles.iter().find(|role| of(&role.name))?.precision
}

/// States that become narrow: in no graph is anything written to them but narrow values of one type, and nothing read from
/// them but to replace some of their places.
fn narrow_states(program: &Program, plans: &[Plan]) -> BTreeMap<StateId, DType> {
    let mut found: BTreeMap<StateId, Option<DType>> = BTreeMap::new();
    for (graph, plan) in program.graphs.iter().zip(plans) {
        let reads: BTreeMap<Value, StateId> = dsgc_ir::trained::reads(graph);
        for (_, op) in graph.ops() {
            for (i, arg) in op.args.iter().enumerate() {
                if let Some(&state) = reads.get(arg)
                    && !(i == 0 && matches!(op.op, Op::WriteAt { .. }))
                {
                    found.insert(state, None);
                }
            }
            if let Op::Write { state } = op.op {
                let now = plan.narrow(op.args[0]);
                let so_far = found.entry(state).or_insert(now);
                *so_far = so_far.filter(|dtype| Some(*dtype) == now);
            }
        }
        for (_, output) in &graph.outputs {
            if let Some(&state) = reads.get(output) {
                found.insert(state, None);
            }
        }
    }
    let states = found
        .into_iter()
        .filter(|(state, _)| !matches!(program.state(*state).kind, StateKind::Param { .. } | StateKind::Copy { .. }));
    states.filter_map(|(state, dtype)| Some((state, dtype?))).collect()
}

/// A graph that is rewritten.
struct Narrowing<'a> {
    program: &'a Program,
    plan: &'a Plan,
    rebuild: Rebuild<'a>,
    /// Old value and type -> the value as that type.
    casts: BTreeMap<(Value, DType), Value>,
}

impl Narrowing<'_> {
    fn graph(mut self) -> Graph {
        let graph = self.rebuild.old;
        for (_, op) in graph.ops() {
            self.op(op);
        }
        let outputs = graph.outputs.iter().map(|(name, v)| (name.clone(), self.of_type(*v, graph.ty(*v).dtype)));
        self.rebuild.new.outputs = outputs.collect();
        without_dead_ops(&self.rebuild.new, self.program)
    }

    fn op(&mut self, op: &OpData) {
        let narrow = match policy(&op.op) {
            Policy::Product | Policy::Attention | Policy::Lookup => self.plan.computes(op),
            Policy::Follows => op.results().find_map(|r| self.plan.narrow(r)),
            Policy::Reads => op.args.first().and_then(|&a| self.plan.narrow(a)),
            Policy::Wide => match op.op {
                Op::Write { state } => Some(self.program.state(state).ty.dtype).filter(|dtype| dtype.is_narrow()),
                _ => None,
            },
        };
        let args = self.operands(op, narrow);
        let new = match (&op.op, narrow) {
            (Op::Contract { spec }, Some(_)) if self.plan.narrow(op.result()).is_none() => {
                let labels = Contraction::parse(spec).expect("verified ops have readable specs");
                Op::Contract { spec: Contraction { wide: true, ..labels }.spec() }
            }
            (op, _) => op.clone(),
        };
        self.rebuild.push(op, new, &args, self.program);
    }

    /// The operands of an op whose floats are to be of a type.
    fn operands(&mut self, op: &OpData, narrow: Option<DType>) -> Vec<Value> {
        let floats = match op.op {
            Op::TokenLogp {} | Op::Embed {} => 1,
            // Frequencies are f32 always, and so are slopes.
            Op::Rope { .. } => 1,
            Op::Attention { .. } | Op::CachedAttention { .. } => 3,
            _ => op.args.len(),
        };
        let mut args = Vec::new();
        for (i, &arg) in op.args.iter().enumerate() {
            let own = self.rebuild.old.ty(arg).dtype;
            let dtype = narrow.filter(|_| own == DType::F32 && i < floats).unwrap_or(own);
            args.push(self.of_type(arg, dtype));
        }
        args
    }

    /// What became of an old value, as elements of a type.
    fn of_type(&mut self, old: Value, dtype: DType) -> Value {
        let new = self.rebuild.get(old);
        if self.rebuild.new.ty(new).dtype == dtype {
            return new;
        }
        if let Some(&cast) = self.casts.get(&(old, dtype)) {
            return cast;
        }
        let def = self.rebuild.old.def(old).map(|def| self.rebuild.old.op(def).clone());
        let site = def.as_ref().map_or(Site::default(), |op| op.site.clone());
        // A parameter in another order is the cast parameter in that order, of which there can be a copy; so is a number.
        let flexible = matches!(self.plan.get(old), Nature::Param(_) | Nature::Free);
        let value = match def {
            Some(OpData { op: Op::Const { value, .. }, .. }) => {
                Builder::new(&mut self.rebuild.new, site).one(Op::Const { value, dtype }, &[])
            }
            Some(op) if flexible && policy(&op.op) == Policy::Follows => {
                let args = self.operands(&op, Some(dtype));
                Builder::new(&mut self.rebuild.new, site).one(op.op, &args)
            }
            _ => Builder::new(&mut self.rebuild.new, site).cast(new, dtype),
        };
        self.casts.insert((old, dtype), value);
        value
    }
}
