//! Devices as users choose them: what is there, what is missing, and the same numbers on each.

use super::Workplace;
use super::run::{metrics, numbers};

#[test]
fn doctor_says_what_the_machine_has() {
    let place = Workplace::new();
    let ended = place.run(&["doctor"]);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let lines: Vec<&str> = ended.out.lines().collect();
    assert!(lines[0].starts_with("cpu: ") && lines[0].ends_with(" threads"), "{}", ended.out);
    let of = |device: &str| lines.iter().find(|line| line.contains(device)).expect("a line for every device");
    let missing = "built without the device";
    assert_eq!(of("cuda").contains(missing), !cfg!(feature = "cuda"), "{}", ended.out);
    // Where there is a build for it, the tests have a Vulkan adapter.
    let expected = if cfg!(feature = "wgpu") { " at once, features beyond f32: " } else { missing };
    assert!(of("wgpu").contains(expected), "{}", ended.out);
    // The tests have both, side by side.
    assert!(["Open MPI", "MPICH"].iter().all(|mpi| of("mpi: launchers: ").contains(mpi)), "{}", ended.out);
    assert!(["libmpi.so.40", "libmpich.so.12"].iter().all(|mpi| of("mpi: libraries: ").contains(mpi)), "{}", ended.out);
}

#[test]
fn a_device_that_is_not_there_is_one_sentence() {
    let place = Workplace::new();
    if !cfg!(feature = "cuda") {
        for command in ["run", "compile"] {
            let ended = place.run(&[command, "pipeline.yaml", "--stage", "sft", "--device", "cuda"]);
            assert_eq!((ended.code, ended.out.as_str()), (Some(1), ""), "{}", ended.err);
            assert!(ended.err.starts_with("error: this dsgc was built without the device `cuda`\n"), "{}", ended.err);
            assert!(ended.err.contains("cargo build --release --features cuda"), "{}", ended.err);
            assert!(!ended.err.contains("panicked"), "{}", ended.err);
        }
    }
    if cfg!(feature = "wgpu") {
        let mut command = place.command(&["run", "pipeline.yaml", "--stage", "sft", "--device", "wgpu"]);
        let nowhere = place.path("no-driver.json");
        let ended = command.env("VK_ICD_FILENAMES", &nowhere).env("VK_DRIVER_FILES", &nowhere).output();
        let ended = ended.expect("the program starts");
        let err = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{err}");
        assert!(err.contains("error: the device `wgpu` finds no Vulkan adapter on this machine"), "{err}");
        assert!(!err.contains("panicked"), "{err}");
    }
}

/// The interpreter is a device as well, so this shows something in every build.
#[test]
fn devices_train_to_the_same_numbers() {
    let others: &[&str] = if cfg!(feature = "wgpu") { &["interp", "wgpu"] } else { &["interp"] };
    let run = |device: &str| {
        let place = Workplace::new();
        let args = ["run", "pipeline.yaml", "--stage", "sft", "--device", device, "--set", "save_steps=1"];
        let ended = place.run(&args);
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        place
    };
    let losses = |place: &Workplace| numbers(&metrics(place, "runs/sft/metrics.jsonl"), "loss");
    let cpu = run("cpu");
    let expected = losses(&cpu);
    let near = |found: &[f64], device: &str| {
        assert_eq!(found.len(), expected.len(), "{device}");
        let error = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(error < 1e-4, "{found:?} on {device}, {expected:?} on the CPU");
    };
    for device in others {
        near(&losses(&run(device)), device);
        // What begins on one device goes on on another.
        let checkpoint = "runs/sft/checkpoints/step-00000001";
        let args = ["run", "pipeline.yaml", "--stage", "sft", "--device", device, "--resume", checkpoint];
        let ended = cpu.run(&args);
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        near(&losses(&cpu), device);
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn compile_says_which_kernels_ops_become_without_a_gpu() {
    let place = Workplace::new();
    let nowhere = place.path("no-driver.json");
    let compile = |set: &str| {
        let args = ["compile", "pipeline.yaml", "--stage", "sft", "--device", "wgpu", "--set", set];
        let mut command = place.command(&args);
        let ended = command.env("VK_ICD_FILENAMES", &nowhere).env("VK_DRIVER_FILES", &nowhere).output();
        let ended = ended.expect("the program starts");
        assert_eq!(ended.status.code(), Some(0), "{}", String::from_utf8_lossy(&ended.stderr));
        String::from_utf8(ended.stdout).expect("reports are text")
    };
    let (single, narrow) = (compile("defaults.bf16=false"), compile("defaults.bf16=true"));
    for report in [&single, &narrow] {
        let (_, kernels) =
            report.split_once("  kernels         ops, what they become").expect("the report has kernels");
        for what in ["product, tiles of 64 x 64 by 16", "attention, a cube a query", "region of ", "optimizer, "] {
            assert!(kernels.contains(what), "no {what} in\n{report}");
        }
    }
    assert!(!single.contains("narrow floats") && narrow.contains("; narrow floats as they lie"), "{narrow}");
    let ended = place.run(&["compile", "pipeline.yaml", "--stage", "sft", "--device", "cpu"]);
    assert!(!ended.out.contains("  kernels "), "the CPU says no such thing: {}", ended.out);
}

#[cfg(feature = "wgpu")]
#[test]
fn several_ranks_on_a_gpu_compile() {
    let place = Workplace::new();
    let args = ["compile", "pipeline.yaml", "--stage", "sft", "--device", "wgpu", "--set", "compile.devices=2"];
    let ended = place.run(&args);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.out.contains("sent between ranks, through the host or from device to device"), "{}", ended.out);
}
