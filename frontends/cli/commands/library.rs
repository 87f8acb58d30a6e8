//! `dsgc std`: the standard library.

use clap::Subcommand;
use dsgc_ir::diag::{Diag, nearest};
use dsgc_yaml::library::ENTRIES;

use super::Done;
use crate::console::say;

/// Arguments of `dsgc std`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// List all documents.
    List,
    /// Print a document, to copy or extend.
    Show {
        /// Its name, e.g. `opt`; `recipes/sft` where two kinds have one name.
        name: String,
    },
}

/// Runs the command.
pub fn run(args: &Args) -> Done {
    match &args.action {
        Action::List => {
            for entry in ENTRIES {
                say(format!("{}/{}", entry.kind, entry.name));
            }
            Ok(())
        }
        Action::Show { name } => {
            let full = |e: &dsgc_yaml::library::Entry| format!("{}/{}", e.kind, e.name);
            let found: Vec<_> = ENTRIES.iter().filter(|e| e.name == name || full(e) == *name).collect();
            match found.as_slice() {
                [entry] => {
                    say(entry.text.trim_end());
                    Ok(())
                }
                [] => {
                    let diag = Diag::error(format!("the standard library has no document `{name}`"));
                    Err(match nearest(name, ENTRIES.iter().map(|e| e.name)) {
                        Some(near) => diag.help(format!("did you mean `{near}`?")),
                        None => diag.help("`dsgc std list` lists all of them"),
                    }
                    .into())
                }
                several => {
                    let names: Vec<String> = several.iter().map(|e| format!("`{}`", full(e))).collect();
                    Err(Diag::error(format!("`{name}` is the name of {}", names.join(" and "))).into())
                }
            }
        }
    }
}
