//! Products that a region finishes.
//!
//! ```text
//! %h = contract %x, %w spec=bi,oi->bo             %y = contract_fused %x, %w, %bias spec=bi,oi->bo common=0
//! %y = fused %h, %bias shape=[B, 8]          =>        bodies=[{$2 = add $0, $1; $3 = relu $2; return $3}]
//!     body={$2 = add $0, $1; $3 = relu $2; ..}
//! ```
//!
//! A product goes into the region, or the elementwise op, that alone reads it, and has its shape, phase and layer. Where
//! several products are one op, each must have such a region. The one op stands where the products stood, so all else
//! that the regions read must be there already; what only names a state or looks at other bytes moves up. The product is
//! neither written nor read any more, and its memory is the first result's, so neither bytes moved nor memory grow.
//! Results that the region has besides would lie in memory earlier than before: it has them only if nothing works in
//! between.

use dsgc_ir::{Body, Class, Dim, Graph, Loc, Op, OpData, OpId, Program, Reason, Site, Step, Type, Value};

use super::is_step;
use crate::pipeline::PassContext;
use crate::rebuild::Rebuild;

/// The graph with its products finished by their regions, where the target can.
pub(super) fn finish(graph: &Graph, program: &Program, context: &PassContext) -> Graph {
    let mut plan = Plan::new(graph);
    for (id, op) in graph.ops() {
        if let Some(finished) = plan.finished(id, op).filter(|finished| plan.has_kernel(finished, context)) {
            plan.take(id, finished);
        }
    }
    let products = plan.finished.iter().flatten();
    let count = products.clone().map(|finished| finished.regions.len()).sum();
    if count == 0 {
        return graph.clone();
    }
    context.matched("products finished by a region", count);
    plan.build(program)
}

/// Products as one op with their regions.
struct Finished {
    op: Op,
    args: Vec<Value>,
    /// In the order of the products.
    regions: Vec<OpId>,
}

/// Which products are finished by which regions.
struct Plan<'a> {
    graph: &'a Graph,
    /// Per value, the ops that use it; outputs are used by the op after the last.
    users: Vec<Vec<OpId>>,
    /// Per op, the op in whose place it stands.
    at: Vec<OpId>,
    /// Per op, what takes its place.
    finished: Vec<Option<Finished>>,
    /// Whether an op is part of another.
    taken: Vec<bool>,
}

impl<'a> Plan<'a> {
    fn new(graph: &'a Graph) -> Plan<'a> {
        let mut users = vec![Vec::new(); graph.values().len()];
        for (id, op) in graph.ops() {
            op.args.iter().for_each(|a| users[a.0 as usize].push(id));
        }
        for (_, value) in &graph.outputs {
            users[value.0 as usize].push(OpId(graph.len() as u32));
        }
        let n = graph.len();
        let at = (0..n as u32).map(OpId).collect();
        Plan { graph, users, at, finished: (0..n).map(|_| None).collect(), taken: vec![false; n] }
    }

    /// An op with the regions that finish all its products, if it has products and all have such.
    fn finished(&self, id: OpId, op: &OpData) -> Option<Finished> {
        let (spec, common) = match &op.op {
            Op::Contract { spec } => (spec, 0),
            Op::ContractEach { spec, common } => (spec, *common),
            _ => return None,
        };
        // Weights that are kept in fewer bits than their product computes in have kernels of their own.
        let dtype = |value: Value| self.graph.ty(value).dtype;
        if op.args.iter().any(|&arg| dtype(arg) != dtype(op.args[0])) {
            return None;
        }
        let (mut args, mut bodies, mut regions) = (op.args.clone(), Vec::new(), Vec::new());
        for product in op.results() {
            let region =
                self.region(product).filter(|region| !regions.contains(region) && self.fits(id, product, *region))?;
            let (body, operands) = finishing(self.graph.op(region), product);
            args.extend(operands);
            bodies.push(body);
            regions.push(region);
        }
        Some(Finished { op: Op::ContractFused { spec: spec.clone(), common, bodies }, args, regions })
    }

    /// The region that alone reads a product.
    fn region(&self, product: Value) -> Option<OpId> {
        let users = &self.users[product.0 as usize];
        let region = *users.first().filter(|first| users.iter().all(|user| user == *first))?;
        let op = ((region.0 as usize) < self.graph.len()).then(|| self.graph.op(region))?;
        let elementwise = matches!(op.op, Op::Fused { .. }) || is_step(self.graph, op);
        (elementwise && !self.taken[region.0 as usize]).then_some(region)
    }

    /// Whether a region can stand in the place of a product.
    fn fits(&self, id: OpId, product: Value, region: OpId) -> bool {
        let (op, own) = (self.graph.op(region), self.graph.op(id));
        let dims = |value: Value| -> &[Dim] { &self.graph.ty(value).dims };
        let mut results = op.results();
        results.next().is_some_and(|first| dims(first) == dims(product))
            && op.site.phase == own.site.phase
            && op.site.tag == own.site.tag
            && op.args.iter().all(|&arg| arg == product || self.ready(arg, id))
            && (results.len() == 0 || !(id.0 + 1..region.0).any(|i| self.works(OpId(i))))
    }

    /// Whether a value is there before the op in a place, or can be.
    fn ready(&self, value: Value, place: OpId) -> bool {
        let Some(def) = self.graph.def(value) else { return true };
        let op = self.graph.op(def);
        let moves = matches!(op.op.class(), Class::View) || matches!(op.op, Op::Read { .. } | Op::Const { .. });
        self.at[def.0 as usize] < place || (moves && op.args.iter().all(|&arg| self.ready(arg, place)))
    }

    /// Whether an op runs a kernel in its place.
    fn works(&self, id: OpId) -> bool {
        !matches!(self.graph.op(id).op.class(), Class::View | Class::State) && self.at[id.0 as usize] == id
    }

    fn has_kernel(&self, Finished { op, args, .. }: &Finished, context: &PassContext) -> bool {
        let types: Vec<Type> = args.iter().map(|&arg| self.graph.ty(arg).clone()).collect();
        context.target.missing_kernel(op, &types).is_none()
    }

    /// Puts an op into the place of products, and the regions with it.
    fn take(&mut self, id: OpId, finished: Finished) {
        finished.args.iter().for_each(|&arg| self.move_up(arg, id));
        for region in &finished.regions {
            self.at[region.0 as usize] = id;
            self.taken[region.0 as usize] = true;
        }
        self.finished[id.0 as usize] = Some(finished);
    }

    /// Says that a value is there before the op in a place.
    fn move_up(&mut self, value: Value, place: OpId) {
        let Some(def) = self.graph.def(value).filter(|def| self.at[def.0 as usize] >= place) else { return };
        self.at[def.0 as usize] = place;
        self.graph.op(def).args.iter().for_each(|&arg| self.move_up(arg, place));
    }

    fn build(&self, program: &Program) -> Graph {
        let mut rebuild = Rebuild::same(self.graph);
        for (id, op) in self.graph.ops() {
            if let Some(finished) = &self.finished[id.0 as usize] {
                finished.args.iter().for_each(|&arg| self.make(arg, &mut rebuild, program));
                self.push(op, finished, &mut rebuild);
            } else if !self.taken[id.0 as usize] && op.results().all(|r| rebuild.find(r).is_none()) {
                rebuild.copy(op, program);
            }
        }
        rebuild.finish()
    }

    /// Makes a value that is needed before its turn.
    fn make(&self, value: Value, rebuild: &mut Rebuild, program: &Program) {
        if rebuild.find(value).is_none() {
            let op = self.graph.op(self.graph.def(value).expect("inputs are there from the beginning"));
            op.args.iter().for_each(|&arg| self.make(arg, rebuild, program));
            rebuild.copy(op, program);
        }
    }

    fn push(&self, products: &OpData, finished: &Finished, rebuild: &mut Rebuild) {
        let args: Vec<Value> = finished.args.iter().map(|&arg| rebuild.get(arg)).collect();
        let loc = products.site.loc;
        let reason = if loc.span.is_some() { Reason::Fused } else { loc.reason };
        let site = Site { loc: Loc { reason, ..loc }, ..products.site.clone() };
        let pushed = rebuild.new.try_push(finished.op.clone(), &args, None, site);
        let id = pushed.unwrap_or_else(|why| panic!("bug: a finished product in graph @{}: {why}", self.graph.name));
        let new: Vec<Value> = rebuild.new.op(id).results().collect();
        let old = finished.regions.iter().flat_map(|&region| self.graph.op(region).results());
        for (old, new) in old.zip(new) {
            rebuild.new.set_name(new, self.graph.name_of(old));
            rebuild.set(old, new);
        }
    }
}

/// What a region computes with a product as the first operand of its body, and its other operands.
fn finishing(region: &OpData, product: Value) -> (Body, Vec<Value>) {
    let mut operands: Vec<Value> = Vec::new();
    for &arg in &region.args {
        if arg != product && !operands.contains(&arg) {
            operands.push(arg);
        }
    }
    let number = |arg: Value| operands.iter().position(|&operand| operand == arg).map_or(0, |i| 1 + i);
    let numbers: Vec<usize> = region.args.iter().map(|&arg| number(arg)).collect();
    let count = 1 + operands.len();
    let body = match &region.op {
        Op::Fused { body, .. } => {
            let moved = |value: usize| match numbers.get(value) {
                Some(&operand) => operand,
                None => value - numbers.len() + count,
            };
            let step = |step: &Step| Step { op: step.op.clone(), args: step.args.iter().map(|&a| moved(a)).collect() };
            Body::new(
                count,
                body.steps().iter().map(step).collect(),
                body.results().iter().map(|&r| moved(r)).collect(),
            )
        }
        op => Body::new(count, vec![Step { op: op.clone(), args: numbers }], vec![count]),
    };
    (body, operands)
}
