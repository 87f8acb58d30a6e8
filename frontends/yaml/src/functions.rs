//! `functions:` documents: graphs that others call.

use crate::expr::Word;
use crate::graph::{GRAPH, Graph, TEST, Test};
use crate::node::Node;
use crate::reader::Reader;
use crate::schema::{Form, Table, key};

/// A document of shared graphs.
#[derive(Clone, Debug)]
pub struct Functions {
    /// Its name.
    pub name: Word,
    /// What they are for.
    pub doc: Option<Word>,
    /// Other files of functions that these call.
    pub uses: Vec<Word>,
    /// The functions.
    pub graphs: Vec<Graph>,
    /// Given and expected values.
    pub tests: Vec<Test>,
}

/// Keys of a document of functions.
pub const FUNCTIONS: Table = Table {
    what: "a document of functions",
    keys: &[
        key("functions", Form::Name, "its name"),
        key("doc", Form::Text, "what they are for"),
        key("use", Form::List(&Form::Text), "other files of functions, besides the library's"),
        key("graphs", Form::Map(&Form::Keys(&GRAPH)), "the functions"),
        key("tests", Form::List(&Form::Keys(&TEST)), "given and expected values, run by `dsgc check`"),
    ],
};

pub(crate) fn read(reader: &mut Reader, node: &Node) -> Option<Functions> {
    let fields = reader.fields(node, &FUNCTIONS)?;
    let name = fields.get("functions").and_then(|n| reader.word(n, "a name"));
    let doc = fields.get("doc").and_then(|n| reader.word(n, "a text"));
    let uses = fields.get("use").map_or_else(Vec::new, |n| reader.words(n, "a list of files"));
    let graphs = fields.get("graphs").map_or_else(Vec::new, |n| reader.graphs(n));
    let tests = fields.get("tests").map_or_else(Vec::new, |n| reader.tests(n));
    Some(Functions { name: name?, doc, uses, graphs, tests })
}
