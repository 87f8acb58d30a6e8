//! Graphs in pieces: what a device runs of them, and what ranks along `pipeline` hand on to each other.
//!
//! Every rank runs its pieces on all parts of a batch in the order of the schedule. What a later piece takes is posted to its
//! rank, or kept where that is this one, and is gone when it is taken. At the end all ranks get all outputs. So nothing else
//! of the runtime knows of pieces.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dsgc_ir::diag::Diag;
use dsgc_ir::schedule::{Work, order_of_pieces};
use dsgc_ir::stage::Piece;
use dsgc_ir::{Axis, Planned, StateId, Tensor};
use dsgc_kernels::ranks::{Group, Member, pack, unpack};
use dsgc_kernels::{Device, Launches};

/// Outputs of a graph.
type Made = Vec<(String, Tensor)>;

/// A device that runs the pieces of one place along `pipeline`.
pub(crate) struct InPieces {
    device: Box<dyn Device>,
    program: Arc<Planned>,
    member: Member,
    /// Bytes of tensors that went to other ranks.
    sent: u64,
    spent: Rc<Cell<Spent>>,
}

/// Time that a rank has spent on graphs with gradients in pieces.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spent {
    /// From the first piece of a batch to the last.
    pub all: Duration,
    /// Of it, waiting for what other ranks along `pipeline` hand on.
    pub waiting: Duration,
}

/// The device of a rank as one that runs the pieces of its place along `pipeline`; itself where the program has none.
pub fn in_pieces(device: Box<dyn Device>, program: &Planned, member: &Member) -> Box<dyn Device> {
    InPieces::wrap(device, program, member).0
}

/// What a message between ranks is: outputs of this piece for this part, or what a place gives in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Piece { part: usize, piece: usize },
    Outputs { place: usize },
}

impl InPieces {
    /// The device itself where the program has no pieces; and where it is told how much time is spent on them.
    pub fn wrap(device: Box<dyn Device>, program: &Planned, member: &Member) -> (Box<dyn Device>, Rc<Cell<Spent>>) {
        let spent = Rc::new(Cell::new(Spent::default()));
        if program.stage.pieces.is_empty() {
            return (device, spent);
        }
        let (program, member) = (Arc::new(program.clone()), member.clone());
        (Box::new(InPieces { device, program, member, sent: 0, spent: spent.clone() }), spent)
    }

    fn run_pieces(
        &mut self,
        graph: &str,
        pieces: &[Piece],
        parts: &[Vec<(&str, &Tensor)>],
        wanted: Option<&[&str]>,
    ) -> Result<Vec<Made>, Diag> {
        let member = self.member.clone();
        let (places, here) = (member.mesh.pipeline, self.program.place);
        let order = order_of_pieces(self.program.stage.parallel.order, pieces, places, parts.len());
        let group = member.group(Axis::Pipeline);
        let (got, sent, waiting, started) = (BTreeMap::new(), 0, Duration::ZERO, Instant::now());
        let mut mail = Mail { graph, member: &member, group, got, sent, waiting };
        let is_wanted = |name: &str| wanted.is_none_or(|wanted| wanted.contains(&name));
        // The places that take something from each piece.
        let mut takers: Vec<Vec<usize>> = vec![Vec::new(); pieces.len()];
        for piece in pieces {
            for taken in &piece.takes {
                if !takers[taken.piece].contains(&piece.place) {
                    takers[taken.piece].push(piece.place);
                }
            }
        }
        // Outputs of the graph by part, and values for pieces of this place with how many of them will still take some.
        let mut outputs: Vec<Made> = vec![Vec::new(); parts.len()];
        for &(part, at) in &order[here] {
            let piece = &pieces[at];
            for taken in &piece.takes {
                mail.fetch(What::Piece { part, piece: taken.piece }, pieces[taken.piece].place)?;
            }
            let values: Vec<(&str, &Tensor)> = piece
                .takes
                .iter()
                .flat_map(|taken| {
                    let got = &mail.got[&What::Piece { part, piece: taken.piece }];
                    taken.values.iter().map(move |name| (name.as_str(), &got[name]))
                })
                .collect();
            let inputs: Vec<(&str, &Tensor)> = parts[part].iter().copied().chain(values).collect();
            let gives: Vec<&str> = piece.gives.iter().map(String::as_str).filter(|name| is_wanted(name)).collect();
            let taken_of_it = |place: usize| -> Vec<&str> {
                let of = pieces.iter().filter(move |p| p.place == place).flat_map(|p| &p.takes);
                let mut names: Vec<&str> =
                    of.filter(|t| t.piece == at).flat_map(|t| &t.values).map(String::as_str).collect();
                names.sort_unstable();
                names.dedup();
                names
            };
            let mut asked = gives.clone();
            takers[at].iter().for_each(|&place| asked.extend(taken_of_it(place)));
            asked.sort_unstable();
            asked.dedup();
            let made: BTreeMap<String, Tensor> =
                self.device.run_for(&piece.graph, &inputs, &asked)?.into_iter().collect();
            let what = What::Piece { part, piece: at };
            for &place in &takers[at] {
                let names = taken_of_it(place);
                if place == here {
                    let kept = names.iter().map(|&name| (name.to_string(), made[name].clone()));
                    mail.got.insert(what, kept.collect());
                } else {
                    mail.post(place, what, names.iter().map(|&name| (name, &made[name])))?;
                }
            }
            outputs[part].extend(gives.iter().map(|&name| (name.to_string(), made[name].clone())));
            // What no later piece of this place takes is not needed any more.
            for taken in &piece.takes {
                let later = pieces[at + 1..].iter().filter(|p| p.place == here);
                if !later.flat_map(|p| &p.takes).any(|t| t.piece == taken.piece) {
                    mail.got.remove(&What::Piece { part, piece: taken.piece });
                }
            }
        }
        assert!(mail.got.is_empty(), "bug: values of pieces are left");
        if pieces.iter().any(|piece| piece.work != Work::Forward) {
            let Spent { all, waiting } = self.spent.get();
            self.spent.set(Spent { all: all + started.elapsed(), waiting: waiting + mail.waiting });
        }
        let made = self.share(pieces, &mut mail, &is_wanted, outputs);
        self.sent += mail.sent;
        made
    }

    /// Gives the outputs of all places to all of them.
    fn share(
        &self,
        pieces: &[Piece],
        mail: &mut Mail,
        is_wanted: &dyn Fn(&str) -> bool,
        mut outputs: Vec<Made>,
    ) -> Result<Vec<Made>, Diag> {
        let here = self.program.place;
        let gives = |place: usize| {
            pieces.iter().any(|piece| piece.place == place && piece.gives.iter().any(|name| is_wanted(name)))
        };
        let places = self.member.mesh.pipeline;
        let numbered = |part: usize, name: &str| format!("{part} {name}");
        if gives(here) && !outputs.is_empty() {
            let all = |(part, made): (usize, &Made)| {
                made.iter().map(|(name, tensor)| (numbered(part, name), tensor.clone())).collect::<Vec<_>>()
            };
            let own: Vec<(String, Tensor)> = outputs.iter().enumerate().flat_map(all).collect();
            for place in (0..places).filter(|&place| place != here) {
                let named = own.iter().map(|(name, tensor)| (name.as_str(), tensor));
                mail.post(place, What::Outputs { place: here }, named)?;
            }
        }
        let count = outputs.len();
        for place in (0..places).filter(|&place| place != here && gives(place) && count > 0) {
            let what = What::Outputs { place };
            mail.fetch(what, place)?;
            for (name, tensor) in mail.got.remove(&what).expect("it was fetched") {
                let (part, name) = name.split_once(' ').expect("outputs are numbered");
                let part: usize = part.parse().expect("outputs are numbered");
                outputs[part].push((name.to_string(), tensor));
            }
        }
        outputs.iter_mut().for_each(|made| made.sort_by(|a, b| a.0.cmp(&b.0)));
        Ok(outputs)
    }
}

/// Messages from and to the ranks along `pipeline`, and what has come and was not asked for yet.
struct Mail<'a> {
    /// The graph that is in pieces.
    graph: &'a str,
    member: &'a Member,
    /// The ranks along `pipeline`.
    group: Group<'a>,
    got: BTreeMap<What, BTreeMap<String, Tensor>>,
    /// Bytes of tensors that were posted.
    sent: u64,
    waiting: Duration,
}

impl Mail<'_> {
    fn post<'t>(
        &mut self,
        place: usize,
        what: What,
        tensors: impl Iterator<Item = (&'t str, &'t Tensor)>,
    ) -> Result<(), Diag> {
        let mut message = Vec::new();
        let (kind, a, b) = match what {
            What::Piece { part, piece } => (0, part, piece),
            What::Outputs { place } => (1, place, 0),
        };
        let tensors: Vec<(&str, &Tensor)> = tensors.collect();
        [kind, a, b, tensors.len()].iter().for_each(|&number| message.extend((number as u64).to_ne_bytes()));
        for (name, tensor) in tensors {
            message.extend((name.len() as u64).to_ne_bytes());
            message.extend(name.as_bytes());
            message.extend(pack(tensor));
            self.sent += tensor.data.bytes() as u64;
        }
        self.group.post(place, message)
    }

    /// Waits until this has come from a place.
    fn fetch(&mut self, what: What, place: usize) -> Result<(), Diag> {
        if self.got.contains_key(&what) {
            return Ok(());
        }
        self.member.transport.note(&format!("values of @{} from place {place} along `pipeline`", self.graph));
        let since = Instant::now();
        while !self.got.contains_key(&what) {
            let message = self.group.receive(place)?;
            let (found, tensors) = opened(&message);
            self.got.insert(found, tensors);
        }
        self.waiting += since.elapsed();
        Ok(())
    }
}

/// What a message says.
fn opened(message: &[u8]) -> (What, BTreeMap<String, Tensor>) {
    fn number(rest: &mut &[u8]) -> usize {
        let (head, tail) = rest.split_at(size_of::<u64>());
        *rest = tail;
        u64::from_ne_bytes(head.try_into().expect("it is as long")) as usize
    }
    let mut rest = message;
    let [kind, a, b, count] = [(); 4].map(|()| number(&mut rest));
    let what = if kind == 0 { What::Piece { part: a, piece: b } } else { What::Outputs { place: a } };
    let mut tensors = BTreeMap::new();
    for _ in 0..count {
        let len = number(&mut rest);
        let (name, after) = rest.split_at(len);
        let (tensor, after) = unpack(after);
        tensors.insert(String::from_utf8(name.to_vec()).expect("names are text"), tensor);
        rest = after;
    }
    (what, tensors)
}

impl Device for InPieces {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn set_state(&mut self, id: StateId, value: &Tensor) {
        self.device.set_state(id, value);
    }

    fn set_part(&mut self, id: StateId, value: &Tensor) {
        self.device.set_part(id, value);
    }

    fn state(&self, id: StateId) -> Tensor {
        self.device.state(id)
    }

    fn run(&mut self, graph: &str, inputs: &[(&str, &Tensor)]) -> Result<Made, Diag> {
        let mut made = self.run_parts(graph, &[inputs.to_vec()])?;
        Ok(made.swap_remove(0))
    }

    fn run_for(&mut self, graph: &str, inputs: &[(&str, &Tensor)], wanted: &[&str]) -> Result<Made, Diag> {
        let program = self.program.clone();
        match program.stage.pieces.get(graph) {
            Some(pieces) => Ok(self.run_pieces(graph, pieces, &[inputs.to_vec()], Some(wanted))?.swap_remove(0)),
            None => self.device.run_for(graph, inputs, wanted),
        }
    }

    fn run_parts(&mut self, graph: &str, parts: &[Vec<(&str, &Tensor)>]) -> Result<Vec<Made>, Diag> {
        let program = self.program.clone();
        match program.stage.pieces.get(graph) {
            Some(pieces) => self.run_pieces(graph, pieces, parts, None),
            None => self.device.run_parts(graph, parts),
        }
    }

    fn rest(&mut self) {
        self.device.rest();
    }

    fn sent(&self) -> u64 {
        self.device.sent() + self.sent
    }

    fn measure(&mut self) -> bool {
        self.device.measure()
    }

    fn measured(&self) -> Vec<Launches> {
        self.device.measured()
    }
}
