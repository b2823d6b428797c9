//! The memory model: litmus tests with the verdicts of the PTX memory model, and random programs
//! held against its axioms.
//!
//! `VGPU_LITMUS_SEEDS` is the number of runs of each litmus test (default 10000),
//! `VGPU_LITMUS_PROGRAMS` that of random programs (default 400).

mod axioms;
mod host;
mod random;

use std::path::{Path, PathBuf};

use vgpu::litmus::{Claim, Compiled, Summary, Test};
use vgpu::race::Stale;

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
        Err(_) => default,
    }
}

/// The litmus tests, by name.
fn tests() -> Vec<Compiled> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/litmus");
    let entries = std::fs::read_dir(&folder).expect("the folder of the litmus tests");
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "litmus"));
    files.sort();
    let compiled = files.iter().map(|file| {
        let text = std::fs::read_to_string(file).expect("a litmus test");
        let test: Test = text
            .parse()
            .unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        Compiled::new(test).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
    });
    compiled.collect()
}

fn judge(test: &Compiled, seeds: u64, stale: Stale) -> Summary {
    let thorough = stale == Stale::Random && seeds >= 1000;
    test.judge(0..seeds, stale, thorough)
        .unwrap_or_else(|e| panic!("{}: {e}", test.test.name))
}

fn report(all: &[(&Compiled, Summary)]) {
    let mut wrong = Vec::new();
    for (compiled, summary) in all {
        for failure in &summary.failures {
            wrong.push(format!("{}: {failure}", compiled.test.name));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_litmus_test_keeps_its_verdict() {
    let seeds = number("VGPU_LITMUS_SEEDS", 10_000);
    let tests = tests();
    assert!(tests.len() >= 40, "{} tests", tests.len());
    let all: Vec<(&Compiled, Summary)> = tests
        .iter()
        .map(|test| (test, judge(test, seeds, Stale::Random)))
        .collect();
    println!("{:44} {:>9} {:>9}  claim", "test", "share", "races");
    for (compiled, summary) in &all {
        let share = |n: u64| format!("{:.2} %", 100.0 * n as f64 / summary.runs as f64);
        for (claim, condition, words) in &compiled.test.claims {
            println!(
                "{:44} {:>9} {:>9}  {claim:?} {words}",
                compiled.test.name,
                share(summary.count(condition)),
                share(summary.racy),
            );
        }
        if compiled.test.claims.is_empty() {
            let reasons: Vec<&str> = summary.reasons.keys().map(|r| r.name()).collect();
            println!(
                "{:44} {:>9} {:>9}  races: {}",
                compiled.test.name,
                "",
                share(summary.racy),
                reasons.join(", ")
            );
        }
    }
    report(&all);
}

#[test]
fn the_adversary_and_the_newest_values_forbid_the_same() {
    let seeds = number("VGPU_LITMUS_SEEDS", 10_000) / 10;
    let tests = tests();
    for stale in [Stale::Oldest, Stale::Newest] {
        let all: Vec<(&Compiled, Summary)> = tests
            .iter()
            .map(|test| (test, judge(test, seeds, stale)))
            .collect();
        report(&all);
    }
}

/// With the newest values only, interleaving alone shows few of the weak outcomes: that the
/// others appear is the work of the old values.
#[test]
fn old_values_show_what_interleaving_does_not() {
    let mut only_old = 0;
    for test in tests() {
        let newest = judge(&test, 300, Stale::Newest);
        let random = judge(&test, 1000, Stale::Random);
        for (claim, condition, words) in &test.test.claims {
            let (before, now) = (newest.count(condition), random.count(condition));
            if *claim == Claim::Allowed && before == 0 {
                assert!(now > 0, "{}: {words} never appears", test.test.name);
                only_old += 1;
            }
        }
    }
    println!("{only_old} outcomes appear with old values only");
    assert!(only_old >= 20, "{only_old}");
}

#[test]
fn a_wrong_verdict_is_noticed() {
    for (wrong, words) in [
        ("forbidden (P1:r0 == 1 /\\ P1:r1 == 0)", "Forbidden"),
        ("forall P1:r0 == 0", "Forall"),
        ("allowed P1:r0 == 7", "never seen"),
        ("unreached (P1:r0 == 1 /\\ P1:r1 == 0)", "out of reach"),
        ("races some", "no race"),
    ] {
        let text = format!(
            "PTX wrong\n{{ x = 0; y = 0; }}\nP0@gpu 0,cta 0 | P1@gpu 0,cta 1 ;\n\
             st.relaxed.gpu x, 1 | ld.relaxed.gpu r0, y ;\n\
             st.relaxed.gpu y, 1 | ld.relaxed.gpu r1, x ;\n{wrong}\n"
        );
        let test = Compiled::new(text.parse().expect("a test")).expect("a test");
        let summary = judge(&test, 1000, Stale::Random);
        assert!(
            summary.failures[0].contains(words),
            "{wrong}: {:?}",
            summary.failures
        );
    }
    let race = "PTX wrong\n{ x = 0; }\nP0@cta 0 | P1@cta 1 ;\nst.weak x, 1 | ld.weak r0, x ;\n";
    let test = Compiled::new(race.parse().expect("a test")).expect("a test");
    assert!(judge(&test, 10, Stale::Random).failures[0].contains("a race"));
}

#[test]
fn the_same_seed_gives_the_same_outcome() {
    for test in tests() {
        for seed in 0..20 {
            let run = || test.run(seed, Stale::Random).expect("it runs");
            let (one, other) = (run(), run());
            assert_eq!(one.state, other.state, "{} seed {seed}", test.test.name);
            assert_eq!(
                one.findings, other.findings,
                "{} seed {seed}",
                test.test.name
            );
        }
    }
}

/// The axioms agree with the verdicts of the tests that they can judge.
#[test]
fn the_axioms_give_the_verdicts() {
    let mut judged = 0;
    for compiled in tests() {
        let test = &compiled.test;
        let simple = test.threads.iter().flat_map(|t| &t.program).all(|s| {
            use vgpu::litmus::{Op, Value};
            let plain = match &s.op {
                Op::Load { to, .. } => to.len() == 1,
                Op::Store { values, .. } => matches!(values.as_slice(), [Value::Number(_)]),
                Op::Atomic { update, .. } => matches!(update.as_str(), "add" | "exch"),
                Op::Fence { .. } => true,
                Op::Barrier { .. } => false,
            };
            plain && s.guard.is_none()
        });
        if !simple || test.variables.iter().any(|v| v.shared) {
            continue;
        }
        let allowed = axioms::allowed(test);
        for (claim, condition, words) in &test.claims {
            judged += 1;
            let some = allowed.states.iter().any(|s| condition.holds(s));
            let in_order = allowed.in_order.iter().any(|s| condition.holds(s));
            let all = allowed.states.iter().all(|s| condition.holds(s));
            let right = match claim {
                Claim::Forbidden => !some,
                Claim::Forall => all,
                Claim::Allowed => some,
                Claim::Unreached => some && !in_order,
            };
            assert!(right, "{}: the axioms deny: {claim:?} {words}", test.name);
        }
    }
    println!("{judged} claims judged by the axioms");
    assert!(judged >= 60, "{judged}");
}

/// Programs weakened behind the back of the axioms do what those forbid, and that is noticed.
#[test]
fn the_axioms_notice_weaker_programs() {
    for (strong, weak) in [
        ("fence.sc", "fence.acq_rel"),
        ("ld.acquire", "ld.relaxed"),
        ("st.release", "st.relaxed"),
        ("fence.sc.sys", "fence.sc.cta"),
    ] {
        let mut noticed = 0;
        for program in 0..150 {
            let text = random::program(program);
            if !text.contains(strong) {
                continue;
            }
            let test: Test = text.parse().expect("a test");
            let allowed = axioms::allowed(&test);
            let weaker: Test = text.replace(strong, weak).parse().expect("a test");
            let compiled = Compiled::new(weaker).expect("a test");
            noticed += (0..200)
                .filter_map(|seed| compiled.run(seed, Stale::Random).ok())
                .filter(|run| !allowed.states.contains(&run.state))
                .count();
        }
        println!("{weak} for {strong}: {noticed} outcomes that the axioms forbid");
        assert!(noticed > 0, "{weak} for {strong}");
    }
}

/// Whatever random programs come to, the axioms allow.
#[test]
fn random_programs_keep_to_the_axioms() {
    let programs = number("VGPU_LITMUS_PROGRAMS", 400);
    let (mut states, mut in_order, mut reached, mut complete) = (0, 0, 0, 0);
    for program in 0..programs {
        let text = random::program(program);
        let test: Test = text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"));
        let allowed = axioms::allowed(&test);
        let compiled = Compiled::new(test).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..300 {
            let stale = if seed % 10 == 9 {
                Stale::Oldest
            } else {
                Stale::Random
            };
            let run = compiled
                .run(seed, stale)
                .unwrap_or_else(|e| panic!("{e}\n{text}"));
            assert!(
                allowed.states.contains(&run.state),
                "PTX does not allow this (seed {seed}, {stale:?}): {}\n{text}",
                compiled.test.show(&run.state)
            );
            seen.insert(run.state);
        }
        states += allowed.states.len();
        in_order += allowed.in_order.len();
        reached += seen.len();
        complete += usize::from(seen == allowed.in_order);
        // Without load buffering is what the virtual GPU is: it reaches nothing else.
        assert!(seen.is_subset(&allowed.in_order), "load buffering?\n{text}");
    }
    println!(
        "{programs} random programs: PTX allows {states} outcomes, {in_order} of them without \
         load buffering; {reached} of those appeared ({:.1} %), all of them in {complete} programs",
        100.0 * reached as f64 / in_order as f64
    );
    assert!(2 * reached > in_order, "too few of the allowed outcomes");
}
