//! What is known of the values of a plan before it runs: tensors with rows, and how long they may be.

use dsgc_ir::{Bindings, DType, Dim, DimRange, Graph, Symbol, Type};

/// How many places a dim has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// This many for each row of the table.
    Rows(i64),
    /// At least the first, at most the second.
    Range(i64, i64),
}

/// A tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub dtype: DType,
    pub dims: Vec<Extent>,
}

/// The rows that tensors have in common: those of one batch, of what was made of it, or of a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Tells tables apart.
    pub id: usize,
    /// Most rows.
    pub rows: usize,
    /// Rows that stand together: the answers to a prompt.
    pub samples: usize,
    /// The name that the user knows it by.
    pub name: String,
}

/// A named value: a record of tensors, or one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Its path at run time.
    pub path: String,
    /// Tensors by their path below it; of a single tensor the empty one.
    pub fields: Vec<(String, Shape)>,
    /// The rows of those that have any.
    pub table: Option<Table>,
}

impl Value {
    /// The part of this name; `None` if there is none.
    pub fn member(&self, name: &str) -> Option<Value> {
        let below = |field: &str| match field.strip_prefix(name)? {
            "" => Some(String::new()),
            rest => rest.strip_prefix('.').map(String::from),
        };
        let fields: Vec<_> = self.fields.iter().filter_map(|(f, shape)| Some((below(f)?, shape.clone()))).collect();
        let path = format!("{}.{name}", self.path);
        (!fields.is_empty()).then(|| Value { path, fields, table: self.table.clone() })
    }

    /// First parts of the names of its members, each once.
    pub fn members(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for (field, _) in &self.fields {
            let first = field.split('.').next().unwrap_or_default();
            if !names.contains(&first) {
                names.push(first);
            }
        }
        names
    }

    /// The shape, if it is one tensor.
    pub fn tensor(&self) -> Option<&Shape> {
        match &self.fields[..] {
            [(name, shape)] if name.is_empty() => Some(shape),
            _ => None,
        }
    }

    /// Whether it is a sequence of tokens and no more.
    pub fn is_sequence(&self) -> bool {
        let members = self.members();
        members.contains(&"tokens") && members.iter().all(|m| ["tokens", "segment", "trained"].contains(m))
    }

    /// A sequence with this many columns.
    pub fn sequence(path: String, table: &Table, columns: (i64, i64)) -> Value {
        let shape = |dtype| Shape { dtype, dims: vec![Extent::Rows(1), Extent::Range(columns.0, columns.1)] };
        let fields = [("tokens", DType::I32), ("segment", DType::I32), ("trained", DType::Bool)];
        let fields = fields.map(|(name, dtype)| (name.to_string(), shape(dtype)));
        Value { path, fields: fields.into(), table: Some(table.clone()) }
    }
}

/// What the dims of a graph's inputs are in one call.
#[derive(Clone, Debug, Default)]
pub struct Dims {
    /// The dim that counts rows or groups of rows, the table whose, and how many rows are counted as one.
    pub batch: Option<(Symbol, Table, i64)>,
    /// Smallest and largest of all others.
    pub ranges: Vec<DimRange>,
}

impl Dims {
    /// Binds the dims of an input to the shape that it gets; the error says what does not fit.
    pub fn bind(&mut self, ty: &Type, shape: &Shape, table: Option<&Table>) -> Result<(), String> {
        if ty.dtype != shape.dtype || ty.rank() != shape.dims.len() {
            return Err(format!("found {}, expected {ty}", shown(shape)));
        }
        for (dim, extent) in ty.dims.iter().zip(&shape.dims) {
            match (*extent, dim.as_scaled_symbol(), dim.constant()) {
                (Extent::Rows(k), Some((factor, symbol)), _) if factor > 0 && factor % k == 0 => {
                    let table = table.expect("what has rows is of a table");
                    let together = factor / k;
                    if table.samples as i64 % together != 0 {
                        let (name, samples) = (&table.name, table.samples);
                        return Err(format!(
                            "found rows of `{name}`, of which {samples} stand together, where {ty} has {dim}"
                        ));
                    }
                    match &self.batch {
                        Some((known, of, _)) if known == symbol && of.id != table.id => {
                            return Err(format!("found rows of `{}` beside those of `{}`", table.name, of.name));
                        }
                        Some((known, _, counted)) if known == symbol && *counted != together => {
                            return Err(format!(
                                "found {together} rows for one `{symbol}`, which has {counted} already"
                            ));
                        }
                        Some((known, ..)) if known == symbol => {}
                        Some((known, ..)) => {
                            return Err(format!("found `{symbol}` for the rows, which are `{known}` already"));
                        }
                        None => self.batch = Some((symbol.clone(), table.clone(), together)),
                    }
                }
                (Extent::Range(low, high), Some((factor, symbol)), _) if factor > 0 => {
                    let (min, max) = ((low + factor - 1) / factor, high / factor);
                    match self.ranges.iter_mut().find(|r| r.symbol == *symbol) {
                        // What two inputs share is as long as both can be.
                        Some(range) if min <= range.max && max >= range.min => {
                            (range.min, range.max) = (range.min.max(min), range.max.min(max));
                        }
                        Some(range) => {
                            return Err(format!("found {} for `{symbol}`, which is {}", span(min, max), of(range)));
                        }
                        None => self.ranges.push(DimRange { symbol: symbol.clone(), min, max }),
                    }
                }
                (Extent::Range(low, high), _, Some(n)) if !(low..=high).contains(&n) => {
                    return Err(format!("found a dim of {}, expected {n}", span(low, high)));
                }
                (Extent::Rows(_), ..) => {
                    return Err(format!("found rows where {ty} has {dim}"));
                }
                // A dim that follows from others is checked when the graph is called.
                (Extent::Range(..), ..) => {}
            }
        }
        Ok(())
    }

    /// The shape of an output.
    pub fn shape(&self, ty: &Type) -> Shape {
        Shape { dtype: ty.dtype, dims: ty.dims.iter().map(|dim| self.extent(dim)).collect() }
    }

    fn extent(&self, dim: &Dim) -> Extent {
        if let Some((symbol, _, together)) = &self.batch
            && let Some((factor, found)) = dim.as_scaled_symbol()
            && found == symbol
            && factor % together == 0
        {
            return Extent::Rows(factor / together);
        }
        // The extremes of a sum of products lie in the corners of the ranges.
        let mut corners = vec![Bindings::new()];
        for symbol in dim.symbols() {
            let range = self.ranges.iter().find(|r| r.symbol == symbol);
            let ends = range.map_or((0, i64::from(i32::MAX)), |r| (r.min, r.max));
            let with = |n: i64| {
                let symbol = symbol.clone();
                move |corner: &Bindings| {
                    let mut corner = corner.clone();
                    corner.insert(symbol.clone(), n);
                    corner
                }
            };
            corners = corners.iter().map(with(ends.0)).chain(corners.iter().map(with(ends.1))).collect();
        }
        let values = corners.iter().map(|corner| dim.eval(corner).expect("all symbols are bound"));
        let (low, high) = values.fold((i64::MAX, i64::MIN), |(a, b), n| (a.min(n), b.max(n)));
        Extent::Range(low.max(0), high.max(0))
    }
}

/// The ranges that calls of a graph need.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub graph: String,
    /// The dim that counts rows.
    pub batch: Option<Symbol>,
    /// Most rows of any call.
    pub rows: usize,
    /// Smallest and largest of all other dims.
    pub ranges: Vec<DimRange>,
}

impl Entry {
    /// Widens the ranges to another call's.
    pub fn widen(&mut self, other: &Entry) {
        self.rows = self.rows.max(other.rows);
        for range in &other.ranges {
            match self.ranges.iter_mut().find(|r| r.symbol == range.symbol) {
                Some(known) => (known.min, known.max) = (known.min.min(range.min), known.max.max(range.max)),
                None => self.ranges.push(range.clone()),
            }
        }
    }
}

/// Ranges of dims before anything is known of them.
pub fn unknown(graph: &crate::graph::Graph) -> Vec<DimRange> {
    let mut ranges: Vec<DimRange> = Vec::new();
    for (_, ty) in &graph.inputs {
        for dim in crate::lower::binders(ty) {
            if !ranges.iter().any(|r| *r.symbol == *dim) && !graph.dims.iter().any(|d| d.0.text == dim) {
                ranges.push(DimRange { symbol: dim.into(), min: 1, max: i64::from(i32::MAX) });
            }
        }
    }
    ranges
}

/// Whether a graph uses an input.
pub fn uses(graph: &Graph, input: dsgc_ir::Value) -> bool {
    graph.ops().any(|(_, op)| op.args.contains(&input)) || graph.outputs.iter().any(|(_, v)| *v == input)
}

fn span(low: i64, high: i64) -> String {
    if low == high { low.to_string() } else { format!("{low} to {high}") }
}

fn of(range: &DimRange) -> String {
    span(range.min, range.max)
}

/// A shape in the language's words: `f32[rows, 1 to 64]`.
pub fn shown(shape: &Shape) -> String {
    let dims: Vec<String> = shape
        .dims
        .iter()
        .map(|extent| match extent {
            Extent::Rows(1) => "rows".into(),
            Extent::Rows(k) => format!("{k} * rows"),
            Extent::Range(low, high) => span(*low, *high),
        })
        .collect();
    format!("{}[{}]", shape.dtype, dims.join(", "))
}
