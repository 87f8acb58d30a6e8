//! Regions while they grow: which ops are one, and what that op is.

use std::collections::BTreeMap;

use dsgc_ir::body::can_be_step;
use dsgc_ir::verify::{last_uses, root};
use dsgc_ir::{
    Along, Bindings, Body, Builder, Class, DType, Dim, Graph, Loc, Op, OpData, OpId, Phase, Reason, Site, StateId,
    Step, Target, Type, Value,
};

use crate::canonicalize::constant;
use crate::rebuild::Rebuild;

/// The regions of a graph while they grow.
pub(super) struct Regions<'a> {
    graph: &'a Graph,
    bounds: Bindings,
    /// Ops that use each value, ascending; outputs are used by the op after the last.
    users: Vec<Vec<OpId>>,
    last: Vec<u32>,
    /// Per state that the graph writes, the op that makes its new value.
    renewed: BTreeMap<StateId, OpId>,
    /// Per op, the region that it is in.
    pub(super) region: Vec<Option<usize>>,
    /// Per region, its ops, ascending; empty if another has taken it in.
    pub(super) members: Vec<Vec<OpId>>,
}

/// What a step of a region takes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    Constant(f64),
    /// A value of the region.
    Own(Value),
    /// A value from outside; whether it has the dims of rows, and lacks those that are reduced.
    Value(Value, bool),
}

/// What a region goes over.
struct Frame<'a> {
    shape: &'a [Dim],
    /// The reduction, if there is one.
    reduction: Option<(OpId, Along)>,
    /// The dims that it takes away.
    axes: &'a [usize],
    /// The dims of values of the row: those that are left, and with 1 in the place of the others.
    row: Vec<Dim>,
    kept: Vec<Dim>,
}

impl Frame<'_> {
    fn has_rows(&self) -> bool {
        matches!(self.reduction, Some((_, Along::Rows)))
    }

    /// Whether something of these dims is of the row.
    fn is_row(&self, dims: &[Dim]) -> bool {
        self.has_rows() && dims != self.shape && (dims == self.row || dims == self.kept)
    }

    /// Whether an operand of these dims is the same along the row.
    fn is_alike(&self, dims: &[Dim]) -> bool {
        let place = |axis: &usize| (dims.len() + axis).checked_sub(self.shape.len());
        self.axes.iter().all(|axis| place(axis).is_none_or(|i| dims[i].constant() == Some(1)))
    }
}

/// A region as an op.
pub(super) struct RegionOp {
    op: Op,
    /// Operands, and whether they have the dims of rows.
    operands: Vec<(Value, bool)>,
    /// What its results are, and which steps give them.
    results: Vec<(Value, usize)>,
}

impl RegionOp {
    pub(super) fn has_kernel(&self, graph: &Graph, target: &dyn Target) -> bool {
        let types: Vec<Type> = self.operands.iter().map(|operand| graph.ty(operand.0).clone()).collect();
        target.missing_kernel(&self.op, &types).is_none()
    }
}

/// Whether a target has kernels of regions around a reduction.
pub(super) fn has_reductions(target: &dyn Target) -> bool {
    let rows = Type::new(DType::F32, [Dim::from(2i64), Dim::from(2i64)]);
    let step = Step { op: Op::ReduceSum { axes: vec![1] }, args: vec![0] };
    let region = Op::Fused { shape: rows.dims.clone(), body: Body::new(1, vec![step], vec![1]) };
    target.missing_kernel(&region, &[rows]).is_none()
}

impl<'a> Regions<'a> {
    pub(super) fn grow(graph: &'a Graph, reductions: bool) -> Regions<'a> {
        let mut users = vec![Vec::new(); graph.values().len()];
        for (id, op) in graph.ops() {
            op.args.iter().for_each(|a| users[a.0 as usize].push(id));
        }
        for (_, value) in &graph.outputs {
            users[value.0 as usize].push(OpId(graph.len() as u32));
        }
        let mut renewed = BTreeMap::new();
        for (id, op) in graph.ops() {
            if let Op::Write { state } = op.op {
                renewed.insert(state, graph.def(root(graph, op.args[0])).unwrap_or(id));
            }
        }
        let mut regions = Regions {
            graph,
            bounds: graph.upper_bounds(),
            users,
            last: last_uses(graph),
            renewed,
            region: vec![None; graph.len()],
            members: Vec::new(),
        };
        for (id, op) in graph.ops() {
            if joins(graph, op) && (reductions || !reduces(op)) {
                regions.region[id.0 as usize] = Some(regions.members.len());
                regions.members.push(vec![id]);
                regions.take_in_producers(id);
            }
        }
        regions
    }

    /// Joins the regions of an op's operands with the one that begins with it, the latest first: that one may stand
    /// between the op and an earlier one.
    fn take_in_producers(&mut self, id: OpId) {
        let mut producers: Vec<usize> = self.graph.op(id).args.iter().filter_map(|&a| self.region_of(a)).collect();
        producers.sort_by_key(|&r| std::cmp::Reverse(self.members[r].last().copied()));
        for producer in producers {
            let own = self.region[id.0 as usize].expect("it has just begun one");
            if producer == own || self.members[producer].is_empty() {
                continue;
            }
            if self.may_join(producer, own, id) {
                self.join(producer, own);
            } else if reduces(self.graph.op(id)) {
                self.take_over(producer, own, id);
            }
        }
    }

    fn join(&mut self, older: usize, own: usize) {
        let taken = std::mem::take(&mut self.members[older]);
        taken.iter().for_each(|op| self.region[op.0 as usize] = Some(own));
        self.members[own].extend(taken);
        self.members[own].sort_unstable();
    }

    /// Gives a second reduction what takes the value of a first one, if that moves no more bytes.
    fn take_over(&mut self, older: usize, own: usize, at: OpId) {
        let all = self.members[older].clone();
        let Some(frame) = self.frame(&all).filter(Frame::has_rows) else { return };
        let (first, _) = frame.reduction.expect("it has rows");
        // What is made of the first reduction's value, for every element.
        let (mut of_first, mut moved) = (vec![first], Vec::new());
        for &member in all.iter().filter(|&&m| m > first) {
            let op = self.graph.op(member);
            let made = op.args.iter().any(|&arg| match self.source(arg, member, &all, &frame) {
                Source::Own(value) => self.graph.def(value).is_some_and(|def| of_first.contains(&def)),
                _ => false,
            });
            if made {
                of_first.push(member);
                if !frame.is_row(&self.graph.ty(op.result()).dims) {
                    moved.push(member);
                }
            }
        }
        if !self.graph.def(self.graph.op(at).args[0]).is_some_and(|def| moved.contains(&def)) {
            return;
        }
        let left: Vec<OpId> = all.iter().copied().filter(|op| !moved.contains(op)).collect();
        let mut with = [&moved[..], &self.members[own][..]].concat();
        with.sort_unstable();
        // What everything else that takes it may still join needs no memory in the end.
        let may_follow = |v: &Value| {
            let mut others = self.users[v.0 as usize].iter().filter(|user| with.binary_search(user).is_err());
            let follows = |&user: &OpId| {
                user > at && (user.0 as usize) < self.graph.len() && self.may_follow(user, at, frame.shape)
            };
            others.clone().next().is_some() && others.all(follows)
        };
        let written =
            self.results(&with).into_iter().filter(may_follow).fold(0, |sum, v| self.bytes(v).saturating_add(sum));
        let apart = self.moves(&all).saturating_add(self.moves(&self.members[own]));
        let moves = self.moves(&left).saturating_add(self.moves(&with)).saturating_sub(written);
        if moves > apart {
            return;
        }
        let new = self.members.len();
        moved.iter().for_each(|op| self.region[op.0 as usize] = Some(new));
        self.members.push(moved.clone());
        self.members[older] = left;
        if self.may_join(new, own, at) {
            self.join(new, own);
        } else {
            moved.iter().for_each(|op| self.region[op.0 as usize] = Some(older));
            self.members.pop();
            self.members[older] = all;
        }
    }

    /// Whether an op may become part of the region of an earlier one, whose elements have these dims.
    fn may_follow(&self, id: OpId, earlier: OpId, shape: &[Dim]) -> bool {
        let (op, site) = (self.graph.op(id), &self.graph.op(earlier).site);
        is_step(self.graph, op) && self.shape(id) == shape && in_one_pass(&op.site, site) && op.site.tag == site.tag
    }

    /// Bytes that a region reads and writes.
    fn moves(&self, members: &[OpId]) -> usize {
        let results = self.results(members);
        let operands = self.operands(members);
        operands.iter().map(|operand| operand.0).chain(results).fold(0, |sum, v| self.bytes(v).saturating_add(sum))
    }

    /// The region that makes a value, or what it shows in other dims or stretches.
    fn region_of(&self, mut value: Value) -> Option<usize> {
        loop {
            let def = self.graph.def(value)?;
            match self.graph.op(def) {
                op if stretches(op) => value = op.args[0],
                _ => return self.region[def.0 as usize],
            }
        }
    }

    /// What ops go over, if they can be one region by their dims.
    fn frame(&self, members: &[OpId]) -> Option<Frame<'a>> {
        let mut reductions = members.iter().filter(|&&m| reduces(self.graph.op(m)));
        let (Some(&reduction), next) = (reductions.next(), reductions.next()) else {
            let shape = self.shape(members[0]);
            let alike = members.iter().all(|&m| self.shape(m) == shape);
            return alike.then(|| Frame { shape, reduction: None, axes: &[], row: vec![], kept: vec![] });
        };
        if next.is_some() {
            return None;
        }
        let op = self.graph.op(reduction);
        let (axes, shape) = (reduced_axes(&op.op)?, &self.graph.ty(op.args[0]).dims[..]);
        let row = self.shape(reduction).to_vec();
        let keep = |(i, dim): (usize, &Dim)| if axes.contains(&i) { Dim::from(1i64) } else { dim.clone() };
        let kept = shape.iter().enumerate().map(keep).collect();
        let along = Along::of(axes, shape.len())?;
        let frame = Frame { shape, reduction: Some((reduction, along)), axes, row, kept };
        let fits = |&m: &OpId| m == reduction || self.shape(m) == shape || frame.is_row(self.shape(m));
        members.iter().all(fits).then_some(frame)
    }

    /// Whether values of a region around a reduction are for an element or for a row as their ops say, and reach each other
    /// in no other way than as a row's values are stretched.
    fn flows(&self, members: &[OpId], frame: &Frame) -> bool {
        let Some((reduction, _)) = frame.reduction else { return true };
        let is_member = |op: OpId| members.binary_search(&op).is_ok();
        members.iter().all(|&member| {
            let op = self.graph.op(member);
            let sources: Vec<Source> = op.args.iter().map(|&arg| self.source(arg, member, members, frame)).collect();
            let reaches = |arg: Value| {
                let mut value = arg;
                while let Some(def) = self.graph.def(value).filter(|&d| stretches(self.graph.op(d))) {
                    value = self.graph.op(def).args[0];
                }
                self.graph.def(value).is_some_and(is_member)
            };
            let own = |source: &Source| matches!(source, Source::Own(_));
            if op.args.iter().zip(&sources).any(|(&arg, source)| reaches(arg) && !own(source)) {
                return false;
            }
            let of_row = |source: &Source| match source {
                Source::Own(value) => {
                    let def = self.graph.def(*value);
                    def == Some(reduction) || frame.is_row(&self.graph.ty(*value).dims)
                }
                _ => false,
            };
            let alike = |source: &Source| match source {
                Source::Value(value, of_row) => *of_row || frame.is_alike(&self.graph.ty(*value).dims),
                Source::Constant(_) => true,
                Source::Own(_) => false,
            };
            if member == reduction {
                return !sources.iter().any(|s| matches!(s, Source::Constant(_)) || of_row(s));
            }
            let is_row = sources.iter().any(of_row) && sources.iter().all(|s| of_row(s) || alike(s));
            is_row == frame.is_row(self.shape(member)) && (frame.has_rows() || !sources.iter().any(of_row))
        })
    }

    /// Whether a region of elementwise ops can finish a product, which then is neither written nor read.
    fn finishes(&self, members: &[OpId]) -> bool {
        let at = self.graph.op(members[0]);
        members.iter().flat_map(|&m| &self.graph.op(m).args).any(|&arg| {
            let Some(product) = self.graph.def(arg).map(|def| self.graph.op(def)) else { return false };
            matches!(product.op, Op::Contract { .. } | Op::ContractEach { .. })
                && self.graph.ty(arg).dims == self.shape(members[0])
                && product.site.phase == at.site.phase
                && product.site.tag == at.site.tag
                && self.users[arg.0 as usize].iter().all(|user| members.contains(user))
        })
    }

    /// Whether a region can run at `at`, the end of another, as part of that one.
    fn may_join(&self, older: usize, own: usize, at: OpId) -> bool {
        let members = &self.members[older];
        let (first, next) = (self.graph.op(members[0]), self.graph.op(at));
        if !in_one_pass(&first.site, &next.site) || first.site.tag != next.site.tag {
            return false;
        }
        let mut both = [&members[..], &self.members[own][..]].concat();
        both.sort_unstable();
        let Some(frame) = self.frame(&both).filter(|frame| self.flows(&both, frame)) else { return false };
        let elementwise = |members: &[OpId]| !members.iter().any(|&m| reduces(self.graph.op(m)));
        let finishes = |region: usize| elementwise(&self.members[region]) && self.finishes(&self.members[region]);
        if frame.reduction.is_some() && (finishes(older) || finishes(own)) {
            return false;
        }
        let end = *members.last().expect("a region has an op");
        let inside = |op: OpId| self.in_region(op, older) || self.in_region(op, own);
        let values: Vec<Value> = members.iter().flat_map(|&m| self.graph.op(m).results()).collect();
        let needs = |&u: &OpId| u < at && !inside(u) && !self.disappears(u, Some(at), &both, &frame);
        if values.iter().any(|v| self.users[v.0 as usize].iter().any(needs)) {
            return false;
        }
        let operands: Vec<Value> = self.operands(members).into_iter().map(|operand| operand.0).collect();
        if operands.iter().any(|&v| self.renewed_before(v, at)) {
            return false;
        }
        let works = |i: u32| !inside(OpId(i)) && !self.is_free(OpId(i));
        if !(end.0 + 1..at.0).any(works) {
            return true;
        }
        // Other work lies between: it must not find more memory in use than before.
        let here: Vec<Value> = self.operands(&self.members[own]).into_iter().map(|operand| operand.0).collect();
        let waits =
            |v: &&Value| self.last[root(self.graph, **v).0 as usize] < at.0 && !self.is_state(**v) && !here.contains(v);
        let all_bytes = |values: &[Value], counts: &dyn Fn(&&Value) -> bool| {
            values.iter().filter(counts).fold(0usize, |sum, &v| sum.saturating_add(self.bytes(v)))
        };
        let waited_for = |v: &&Value| self.users[v.0 as usize].iter().any(|&u| u >= at || self.in_region(u, own));
        let (kept, freed) = (all_bytes(&operands, &waits), all_bytes(&values, &waited_for));
        kept <= freed
    }

    /// Whether an op that shows a value of a region with rows in other dims, or stretches it, goes away: everything that
    /// takes it is in the region. What comes later than the region, at `at`, can still be made then.
    fn disappears(&self, id: OpId, at: Option<OpId>, members: &[OpId], frame: &Frame) -> bool {
        let inside = (id.0 as usize) < self.graph.len();
        let Some(op) = inside.then(|| self.graph.op(id)).filter(|op| stretches(op)) else { return false };
        let taken = |&user: &OpId| match members.binary_search(&user) {
            Ok(_) => {
                let mut args = self.graph.op(user).args.iter().filter(|&&arg| arg == op.result());
                args.all(|&arg| matches!(self.source(arg, user, members, frame), Source::Own(_)))
            }
            Err(_) => at.is_some_and(|at| user > at) || self.disappears(user, at, members, frame),
        };
        frame.has_rows() && self.users[op.result().0 as usize].iter().all(taken)
    }

    fn in_region(&self, op: OpId, region: usize) -> bool {
        self.region.get(op.0 as usize).is_some_and(|r| *r == Some(region))
    }

    /// The dims of what an op of a region computes.
    fn shape(&self, op: OpId) -> &'a [Dim] {
        &self.graph.ty(self.graph.op(op).result()).dims
    }

    /// Bytes of a value; a program that no memory holds is refused later.
    fn bytes(&self, value: Value) -> usize {
        self.graph.ty(value).bytes(&self.bounds).expect("the verifier saw that every dim is declared")
    }

    fn is_state(&self, value: Value) -> bool {
        self.read_by(value).is_some()
    }

    /// The state whose bytes a value is.
    fn read_by(&self, value: Value) -> Option<StateId> {
        match self.graph.op(self.graph.def(root(self.graph, value))?).op {
            Op::Read { state } => Some(state),
            _ => None,
        }
    }

    /// Whether a value is that of a state which has its new value when `at` runs.
    fn renewed_before(&self, value: Value, at: OpId) -> bool {
        self.read_by(value).and_then(|state| self.renewed.get(&state)).is_some_and(|&new| new < at)
    }

    /// Whether an op takes no memory or disappears into regions.
    fn is_free(&self, id: OpId) -> bool {
        let op = self.graph.op(id);
        match op.op {
            Op::Const { .. } | Op::Read { .. } => true,
            Op::Broadcast { .. } => self.users[op.result().0 as usize].iter().all(|u| {
                let user = (u.0 as usize) < self.graph.len();
                user && joins(self.graph, self.graph.op(*u))
            }),
            _ => op.op.class() == Class::View,
        }
    }

    /// What an operand of a member is without its broadcasts.
    fn source(&self, value: Value, member: OpId, members: &[OpId], frame: &Frame) -> Source {
        let at = *members.last().expect("a region has an op");
        let is_member = |value: Value| self.graph.def(value).is_some_and(|d| members.binary_search(&d).is_ok());
        if is_member(value) {
            return Source::Own(value);
        }
        if let Some(constant) = constant(self.graph, value) {
            return Source::Constant(constant);
        }
        let def = |value: Value| self.graph.def(value).map(|d| self.graph.op(d));
        let on_rows = frame.is_row(self.shape(member)) && !reduces(self.graph.op(member));
        if frame.has_rows() {
            // A row's value: as it is for what is of the row, stretched along the row for elements.
            let mut shown = match def(value) {
                _ if on_rows => Some(value),
                Some(OpData { op: Op::Broadcast { .. }, args, .. }) if self.graph.ty(args[0]).dims == frame.kept => {
                    Some(args[0])
                }
                _ => None,
            };
            while let Some(OpData { op: Op::Reshape { .. }, args, .. }) = shown.filter(|&v| !is_member(v)).and_then(def)
            {
                shown = Some(args[0]);
            }
            let is_row = |value: &Value| {
                let reduction = frame.reduction.map(|r| r.0);
                self.graph.def(*value) == reduction || frame.is_row(&self.graph.ty(*value).dims)
            };
            if let Some(own) = shown.filter(|&v| is_member(v)).filter(is_row) {
                return Source::Own(own);
            }
        }
        let value = match def(value) {
            Some(OpData { op: Op::Broadcast { shape }, args, .. })
                if self.graph.ty(args[0]).dims != *shape && !self.renewed_before(args[0], at) =>
            {
                args[0]
            }
            _ => value,
        };
        Source::Value(value, on_rows && self.shape(member) == frame.row && !self.graph.ty(value).is_scalar())
    }

    /// The values that come from outside of a region, each once, in order of use; and whether it lacks the dims that are
    /// reduced.
    pub(super) fn operands(&self, members: &[OpId]) -> Vec<(Value, bool)> {
        let frame = self.frame(members).expect("the ops of a region go over the same");
        let mut all = Vec::new();
        for &member in members {
            for &arg in &self.graph.op(member).args {
                if let Source::Value(value, of_row) = self.source(arg, member, members, &frame)
                    && !all.contains(&(value, of_row))
                {
                    all.push((value, of_row));
                }
            }
        }
        all
    }

    /// The values of a region that something else takes.
    fn results(&self, members: &[OpId]) -> Vec<Value> {
        let frame = self.frame(members).expect("the ops of a region go over the same");
        let outside = |&u: &OpId| members.binary_search(&u).is_err() && !self.disappears(u, None, members, &frame);
        let values = members.iter().map(|&m| self.graph.op(m).result());
        values.filter(|v| self.users[v.0 as usize].iter().any(outside)).collect()
    }

    /// Whether there is less to do in one op: several steps, or a broadcast that disappears. A region has an operand.
    pub(super) fn gains(&self, members: &[OpId]) -> bool {
        let frame = self.frame(members).expect("the ops of a region go over the same");
        let smaller = members.iter().any(|&m| {
            self.graph.op(m).args.iter().any(|&arg| {
                let stretched = !self.graph.ty(arg).is_scalar();
                stretched && !matches!(self.source(arg, m, members, &frame), Source::Value(value, _) if value == arg)
            })
        });
        (members.len() > 1 || smaller) && !self.operands(members).is_empty()
    }

    /// The region as one op.
    pub(super) fn op(&self, members: &[OpId]) -> RegionOp {
        let frame = self.frame(members).expect("the ops of a region go over the same");
        let operands = self.operands(members);
        let mut numbers: BTreeMap<(Value, bool), usize> = operands.iter().enumerate().map(|(i, &v)| (v, i)).collect();
        let mut constants: BTreeMap<String, usize> = BTreeMap::new();
        let wanted = self.results(members);
        let (mut steps, mut results) = (Vec::new(), Vec::new());
        for &member in members {
            let op = self.graph.op(member);
            let mut args = Vec::new();
            for &arg in &op.args {
                args.push(match self.source(arg, member, members, &frame) {
                    Source::Own(value) => numbers[&(value, false)],
                    Source::Value(value, of_row) => numbers[&(value, of_row)],
                    Source::Constant(value) => {
                        let constant = Op::Const { value, dtype: self.graph.ty(arg).dtype };
                        *constants.entry(constant.to_string()).or_insert_with(|| {
                            steps.push(Step { op: constant, args: vec![] });
                            operands.len() + steps.len() - 1
                        })
                    }
                });
            }
            steps.push(Step { op: op.op.clone(), args });
            let number = operands.len() + steps.len() - 1;
            numbers.insert((op.result(), false), number);
            if wanted.contains(&op.result()) {
                results.push((op.result(), number));
            }
        }
        let body = Body::new(operands.len(), steps, results.iter().map(|r| r.1).collect());
        RegionOp { op: Op::Fused { shape: frame.shape.to_vec(), body }, operands, results }
    }

    /// Pushes the region as one op.
    pub(super) fn push(&self, members: &[OpId], rebuild: &mut Rebuild) {
        let frame = self.frame(members).expect("the ops of a region go over the same");
        let RegionOp { op, operands, results } = self.op(members);
        let last = self.graph.op(*members.last().expect("a region has an op"));
        let reason = if members.len() > 1 { Reason::Fused } else { last.site.loc.reason };
        let loc =
            Loc { reason: if last.site.loc.span.is_some() { reason } else { Reason::default() }, ..last.site.loc };
        // Gradients of inputs are what others wait for.
        let of_input = members.iter().any(|&m| self.graph.op(m).site.phase == Phase::BackwardInput);
        let phase = if of_input { Phase::BackwardInput } else { last.site.phase };
        let site = Site { loc, phase, ..last.site.clone() };
        let view = |rebuild: &mut Rebuild, value: Value, shape: Vec<Dim>| {
            Builder::new(&mut rebuild.new, site.clone()).one(Op::Reshape { shape }, &[value])
        };
        let mut args = Vec::new();
        for &(value, of_row) in &operands {
            let new = rebuild.get(value);
            args.push(match of_row {
                false => new,
                true => {
                    let ones = frame.axes.iter().map(|_| Dim::from(1i64));
                    let shape = self.graph.ty(value).dims.iter().cloned().chain(ones).collect();
                    view(rebuild, new, shape)
                }
            });
        }
        let pushed = rebuild.new.try_push(op, &args, None, site.clone());
        let id = pushed.unwrap_or_else(|why| panic!("bug: a region in graph @{}: {why}", self.graph.name));
        let new: Vec<Value> = rebuild.new.op(id).results().collect();
        for ((old, _), new) in results.into_iter().zip(new) {
            let dims = &self.graph.ty(old).dims;
            let new = if rebuild.new.ty(new).dims == *dims { new } else { view(rebuild, new, dims.clone()) };
            rebuild.new.set_name(new, self.graph.name_of(old));
            rebuild.set(old, new);
        }
    }
}

/// Whether an op can be in a region: as a step for every element, or as its reduction.
fn joins(graph: &Graph, op: &OpData) -> bool {
    if !reduces(op) {
        return is_step(graph, op);
    }
    let arg = graph.ty(op.args[0]);
    let axes = reduced_axes(&op.op).expect("it reduces");
    let extent = |goes: bool| {
        let dims = (0..arg.rank()).filter(|i| axes.contains(i) == goes).map(|i| &arg.dims[i]);
        Dim::product(dims).constant()
    };
    let along = match Along::of(axes, arg.rank()) {
        // A device may add a single column as it adds a whole tensor.
        Some(Along::Columns) => extent(false).is_some_and(|n| n > 1),
        Some(Along::Rows | Along::Whole) => true,
        None => false,
    };
    along && extent(true) != Some(1) && can_be_step(&op.op, std::slice::from_ref(arg))
}

/// Whether an op is a reduction with which a region may end.
pub(super) fn ends_region(graph: &Graph, op: &OpData) -> bool {
    let along = || Along::of(reduced_axes(&op.op)?, graph.ty(op.args[0]).rank());
    reduces(op) && joins(graph, op) && along() != Some(Along::Rows)
}

/// Whether ops are both of the forward pass, both of the backward pass, or both of the update.
fn in_one_pass(a: &Site, b: &Site) -> bool {
    let is_backward = |site: &Site| matches!(site.phase, Phase::BackwardInput | Phase::BackwardWeight);
    a.phase == b.phase || (is_backward(a) && is_backward(b))
}

/// Whether an op is a reduction that may be in a region.
fn reduces(op: &OpData) -> bool {
    reduced_axes(&op.op).is_some()
}

fn reduced_axes(op: &Op) -> Option<&[usize]> {
    match op {
        Op::ReduceSum { axes } | Op::ReduceMax { axes } | Op::ReduceMin { axes } => Some(axes),
        _ => None,
    }
}

/// Whether an op can be in a region, and somebody wants its value.
pub(crate) fn is_step(graph: &Graph, op: &OpData) -> bool {
    let types: Vec<Type> = op.args.iter().map(|&a| graph.ty(a).clone()).collect();
    op.op.class() == Class::Elementwise && can_be_step(&op.op, &types)
}

/// Whether an op gives the elements of its operand in other dims, or stretched.
pub(super) fn stretches(op: &OpData) -> bool {
    matches!(op.op, Op::Reshape { .. } | Op::Broadcast { .. })
}
