//! temp
use dsgc_ir::diag::Sources;
use dsgc_yaml::{document, render};
#[test]
fn all() {
    for e in dsgc_yaml::library::ENTRIES {
        let mut s = Sources::default();
        if let Err(d) = document::parse(&mut s, &e.file(), e.text) { println!("{}\n", render::render(&d, &s, render::Look::Plain)); }
    }
    let md = std::fs::read_to_string("/work/shared/language.md").unwrap();
    for (i, b) in md.split("```yaml\n").skip(1).enumerate() {
        let b = b.split("```").next().unwrap();
        let mut s = Sources::default();
        match document::parse(&mut s, &format!("block{i}"), b) { Err(d) => println!("{}\n", render::render(&d, &s, render::Look::Plain)), Ok(d) => println!("block{i} ok {}", format!("{d:?}").len()) }
    }
}
