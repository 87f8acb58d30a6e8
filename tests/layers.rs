//! Dependencies point one way: the crates of the workspace know each other as ARCHITECTURE.md says, and no other way.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Crate -> the crates of the workspace that it may and does use. Tests may see more (dev-dependencies).
const EDGES: &[(&str, &[&str])] = &[
    ("dsgc-ir", &[]),
    ("dsgc-passes", &["dsgc-ir"]),
    ("dsgc-kernels", &["dsgc-ir"]),
    ("dsgc-hf", &["dsgc-ir"]),
    ("dsgc-yaml", &["dsgc-ir"]),
    ("dsgc-runtime", &["dsgc-hf", "dsgc-ir", "dsgc-kernels"]),
    ("dsgc", &["dsgc-hf", "dsgc-ir", "dsgc-kernels", "dsgc-passes", "dsgc-runtime", "dsgc-yaml"]),
];

#[test]
fn crates_know_only_those_below_them() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("there are packages");
    let names: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    let found: BTreeMap<&str, BTreeSet<&str>> = packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().expect("a package has a list of them");
            let normal = dependencies.iter().filter(|d| d["kind"] != "dev");
            let ours = normal.filter_map(|d| d["name"].as_str()).filter(|n| names.contains(n));
            (package["name"].as_str().expect("a package has a name"), ours.collect())
        })
        .collect();
    let allowed: BTreeMap<&str, BTreeSet<&str>> =
        EDGES.iter().map(|(name, edges)| (*name, edges.iter().copied().collect())).collect();
    for (name, edges) in &found {
        let known = allowed.get(name).unwrap_or_else(|| panic!("`{name}` is a new crate: say here whom it may know"));
        for edge in edges {
            assert!(known.contains(edge), "`{name}` depends on `{edge}`, which ARCHITECTURE.md does not allow");
        }
    }
    assert_eq!(found, allowed, "an allowed edge is not used: take it out");
}
