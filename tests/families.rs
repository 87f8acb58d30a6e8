//! Models with other attention than OPT and Llama, beside transformers: ALiBi, a sliding window, and one in some layers.
//!
//! `tests/families/make.py` made the references, laid out as those of `tests/golden`.

#[path = "golden/compare.rs"]
#[allow(dead_code)] // The golden tests use the rest.
mod compare;

use std::path::Path;

use compare::{Golden, On};

const FAMILIES: [&str; 3] = ["bloom", "mistral", "ministral"];

fn of(family: &str) -> Golden {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families");
    Golden::open(&folder, family).expect("the references are there")
}

#[test]
fn logits_loss_and_gradients_are_those_of_transformers() {
    for family in FAMILIES {
        for on in [On::Doubles, On::Cpu(2)] {
            let mut compared = of(family).gradients(on).unwrap_or_else(|e| panic!("{e}"));
            assert!(compared.len() > 15, "every parameter has a gradient");
            compared.push(of(family).logits(on).unwrap_or_else(|e| panic!("{e}")));
            for one in compared {
                assert!(one.error < on.tolerance(), "{family} on {on:?}, {}: {:.1e}", one.what, one.error);
            }
        }
    }
}

/// Left-padded prompts: the tokens of transformers, and of every step the logits of one pass over all columns.
#[test]
fn answers_are_those_of_transformers() {
    for family in FAMILIES {
        for (on, allowed) in [(On::Doubles, 1e-12), (On::Cpu(2), 1e-5)] {
            let worst = of(family).decoding(on).unwrap_or_else(|e| panic!("{family} on {on:?}: {e}"));
            assert!(worst < allowed, "{family} on {on:?}: logits differ by {worst:.1e}");
            let tokens = of(family).generated(on).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(tokens.error, 0.0, "{family} on {on:?}: {}", tokens.what);
        }
    }
}
