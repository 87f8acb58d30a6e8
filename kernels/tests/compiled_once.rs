//! A region is compiled once in a process, however often and in however many programs it stands. Alone in its process, as the
//! count is the process'.

#[path = "check/mod.rs"]
#[allow(dead_code)] // The tests of ops use the rest.
mod check;

use check::{plan, program};
use dsgc_kernels::cpu::{Cpu, compile_time};

#[test]
fn a_region_is_compiled_once() {
    let region = |result: &str| {
        format!("%{result} = fused %a, %b shape=[64] body={{$2 = add $0, $1; $3 = mul $2, $1; return $3}}")
    };
    let params = "%a: f32[64], %b: f32[64]";
    let before = compile_time();
    let first = Cpu::new(plan(&program(params, &region("y")), 2), 2);
    let once = compile_time() - before;
    assert!(once.regions == 1 && !once.spent.is_zero(), "{once:?}");
    // The same in another program, twice, on another number of threads, while the first is there and after it.
    let lines = format!("{}\n%z = neg %x\n{}", region("x"), region("y"));
    let second = Cpu::new(plan(&program(params, &lines), 1), 1);
    drop(first);
    let third = Cpu::new(plan(&program(params, &region("y")), 3), 3);
    assert_eq!((compile_time() - before).regions, 1);
    drop((second, third));
}
