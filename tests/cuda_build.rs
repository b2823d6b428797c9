//! The build script's choices: architectures, what compilers print, dependency files.

#[path = "../build/targets.rs"]
mod targets;

#[cfg(feature = "cuda")]
use std::path::Path;

use targets::{Targets, parse_dependencies, parse_list, parse_release};

fn known(list: &str) -> Vec<String> {
    list.split_whitespace().map(String::from).collect()
}

fn choose(wanted: Option<&str>, list: &str, per_arch: bool) -> Result<(String, String), String> {
    let targets = Targets::choose(wanted, &known(list), per_arch)?;
    Ok((targets.machine_code.join(" "), targets.ptx.join(" ")))
}

fn pair(machine_code: &str, ptx: &str) -> Result<(String, String), String> {
    Ok((machine_code.to_owned(), ptx.to_owned()))
}

#[test]
fn by_default_all_that_the_compiler_knows() {
    let all = "75 80 86 89 90 100 103 110 120 121";
    assert_eq!(choose(None, all, false), pair("80 90 100 120", "80"));
    assert_eq!(
        choose(None, all, true),
        pair("80 90 100 120", "80 90 100 120")
    );
    // CUDA 12.4 knows no newer ones; a compiler that does not say is taken to know all.
    assert_eq!(choose(None, "50 80 90", false), pair("80 90", "80"));
    assert_eq!(choose(None, "", false), pair("80 90 100 120", "80"));
    // One that has dropped the oldest: PTX for the lowest that is left.
    assert_eq!(choose(None, "90 100", false), pair("90 100", "90"));
    let error = choose(None, "50 60 70", false).unwrap_err();
    assert!(
        error.contains("50, 60, 70") && error.contains("CUDA_COMPUTE_CAP"),
        "{error}"
    );
}

#[test]
fn a_list_overrides_in_any_spelling() {
    let all = "80 86 90 100 120";
    for list in ["86,90", "8.6;9.0", "sm_90 sm_86", "compute_86, 90,90"] {
        assert_eq!(
            choose(Some(list), all, false),
            pair("86 90", "86"),
            "{list}"
        );
    }
    // Architecture-specific code, of a family that the compiler lists without the letter.
    assert_eq!(choose(Some("90a,80"), all, true), pair("80 90a", "80 90a"));
    assert_eq!(choose(Some("100f"), all, false), pair("100f", "100f"));
}

#[test]
fn a_bad_list_is_an_error_that_names_the_item() {
    for (list, words) in [
        ("", "empty"),
        (" , ", "empty"),
        ("ninety", "\"ninety\""),
        ("90b", "\"90b\""),
        ("90aa", "\"90aa\""),
        ("-1", "\"-1\""),
        ("75", "80 or newer"),
        ("80,999", "sm_999"),
    ] {
        let error = choose(Some(list), "80 90", false).unwrap_err();
        assert!(
            error.contains("CUDA_COMPUTE_CAP") && error.contains(words),
            "{list}: {error}"
        );
    }
}

#[test]
fn arguments_name_machine_code_and_ptx() {
    let targets = Targets::choose(Some("80,90"), &known("80 90"), false).unwrap();
    let expected = [
        "-gencode=arch=compute_80,code=[compute_80,sm_80]",
        "-gencode=arch=compute_90,code=sm_90",
    ];
    assert_eq!(targets.arguments(), expected);
    let common = ["-gencode=arch=compute_80,code=[compute_80,sm_80,sm_90]"];
    assert_eq!(targets.arguments_in_common(), common);
    // Machine code may be for one architecture alone; PTX that all is made from may not.
    let targets = Targets::choose(Some("90a,100f"), &known("90 100"), true).unwrap();
    let common = ["-gencode=arch=compute_90,code=[compute_90,sm_90a,sm_100f]"];
    assert_eq!(targets.arguments_in_common(), common);
}

#[test]
fn what_nvcc_prints_is_understood() {
    let text = "nvcc: NVIDIA (R) Cuda compiler driver\nCopyright (c) 2005-2026\n\
                Cuda compilation tools, release 13.5, V13.5.37\nBuild cuda_13.5.r13.5/compiler.1_0\n";
    assert_eq!(parse_release(text), Some((13, 5)));
    assert_eq!(
        parse_release("Cuda compilation tools, release 12.4, V12.4.131"),
        Some((12, 4))
    );
    for other in [
        "",
        "release",
        "release x.y,",
        "release 13",
        "clang version 18.1.1",
    ] {
        assert_eq!(parse_release(other), None, "{other}");
    }
    assert_eq!(parse_list("sm_75\nsm_80\nsm_100\n"), ["75", "80", "100"]);
    assert_eq!(
        parse_list("nvcc fatal: Unknown option"),
        Vec::<String>::new()
    );
}

#[test]
fn dependency_files_are_read() {
    let text = "norm.fatbin : cuda/norm.cu \\\n    /usr/include/a.h \\\r\n  /with\\ blank/b.h\n";
    assert_eq!(
        parse_dependencies(text),
        ["cuda/norm.cu", "/usr/include/a.h", "/with blank/b.h"]
    );
    assert_eq!(parse_dependencies("C:/out/a.fatbin : C:/a.cu"), ["C:/a.cu"]);
    for empty in ["", "no colon", "target : \n"] {
        assert_eq!(parse_dependencies(empty), Vec::<String>::new(), "{empty}");
    }
}

/// docs.rs has no toolkit; what it builds with is what one generates. To write it anew:
/// `RINGTP_UPDATE_GATES=1 cargo test --features cuda --test cuda_build`.
#[test]
#[cfg(feature = "cuda")]
fn bindings_for_documentation_are_those_generated() {
    if env!("RINGTP_NVCC_RELEASE") != "13.5" {
        test_driver::skipped(format_args!(
            "they are of nvcc 13.5, this is {}",
            env!("RINGTP_NVCC_RELEASE")
        ));
        return;
    }
    let prepared = Path::new(env!("CARGO_MANIFEST_DIR")).join("build/prepared");
    for name in ["driver.rs", "abi.rs"] {
        let generated = std::fs::read_to_string(Path::new(env!("OUT_DIR")).join(name)).unwrap();
        let prepared = prepared.join(name);
        if std::env::var_os("RINGTP_UPDATE_GATES").is_some() {
            std::fs::write(&prepared, &generated).unwrap();
        }
        let found = std::fs::read_to_string(&prepared).unwrap();
        assert!(
            found == generated,
            "{} is out of date; RINGTP_UPDATE_GATES=1 writes it",
            prepared.display()
        );
    }
}
