//! The standard library: models, recipes and functions in the language itself, compiled into the program.

/// A document of the library.
#[derive(Debug)]
pub struct Entry {
    /// `models`, `recipes` or `functions`.
    pub kind: &'static str,
    /// The name that other documents use.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

impl Entry {
    /// What messages call it.
    pub fn file(&self) -> String {
        format!("std/{}/{}.yaml", self.kind, self.name)
    }
}

macro_rules! entries {
    ($($kind:literal / $name:literal),* $(,)?) => {
        &[$(Entry {
            kind: $kind,
            name: $name,
            text: include_str!(concat!("../std/", $kind, "/", $name, ".yaml")),
        }),*]
    };
}

/// All of it.
pub const ENTRIES: &[Entry] = entries![
    "models" / "bloom",
    "models" / "llama",
    "models" / "opt",
    "models" / "value",
    "recipes" / "sft",
    "recipes" / "reward",
    "recipes" / "ppo",
    "recipes" / "dpo",
    "recipes" / "score",
    "functions" / "positions",
    "functions" / "sequences",
];

/// The document of this kind and name.
pub fn find(kind: &str, name: &str) -> Option<&'static Entry> {
    ENTRIES.iter().find(|e| e.kind == kind && e.name == name)
}
