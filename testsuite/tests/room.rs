//! What `--on-full` promises: with far more calls than there is room for, each is in the trace or counted as lost, exactly (I3).

use trapline_testsuite::{
    compare,
    program::{Optimised, Program},
    run::{Command, End},
    scratch::Scratch,
    trace::{self, Report},
    trapline,
};

/// Calls by the program, and what its trace tells.
struct Recording {
    made: u64,
    /// Of `work`.
    calls: u64,
    /// In the whole trace.
    records: u64,
    report: Report,
}

impl Recording {
    /// Records three million calls of `work`, and nothing else, with the least room there is.
    fn with(options: &[&str]) -> Self {
        let scratch = Scratch::new();
        let program = Program::of(&["many_calls.c"]).arguments(&["1000000"]);
        let command = Command::new(program.build(Optimised::Yes, scratch.path()), scratch.path());
        let trace = scratch.join("trace");
        let options = [&["--buffer", "1", "-F", "work"], options].concat();
        let outcome = command.behind(trapline::record(&trace, &options)).run();
        assert_eq!(outcome.end, End::Status(0), "{}", outcome.error_text());
        let text = outcome.text();
        let made = compare::told(&text).find(|(name, _)| *name == "work").expect("the program tells").1;
        let report = Report::read(&trace).expect("a trace");
        let info = trace::ask("info", &trace).expect("a trace");
        let records = info["records"].as_u64().expect("a number of records");
        Self { made, calls: report.calls.get("work").copied().unwrap_or(0), records, report }
    }

    fn lost(&self, cause: &str) -> u64 {
        self.report.lost[cause]
    }

    /// Nothing is lost in other ways than for want of room.
    fn assert_no_other_loss(&self) {
        let others = self.report.losses().into_iter().filter(|(cause, _)| !["full", "overwritten"].contains(cause));
        assert_eq!(others.collect::<Vec<_>>(), []);
    }
}

#[test]
fn blocking_keeps_every_call() {
    for (options, records_a_call) in [(&["--on-full", "block"][..], 2), (&["--on-full", "block", "--no-returns"], 1)] {
        let recording = Recording::with(options);
        assert_eq!(recording.made, 3_000_000);
        assert_eq!((recording.calls, recording.records), (recording.made, records_a_call * recording.made));
        assert_eq!(recording.report.losses(), []);
    }
}

#[test]
fn dropping_keeps_or_counts_every_record() {
    for (options, records_a_call) in [(&["--on-full", "drop"][..], 2), (&["--on-full", "drop", "--no-returns"], 1)] {
        let recording = Recording::with(options);
        assert_eq!(recording.records + recording.lost("full"), records_a_call * recording.made);
        recording.assert_no_other_loss();
    }
}

#[test]
fn overwriting_keeps_the_end_and_counts_the_rest() {
    for (options, records_a_call) in
        [(&["--on-full", "overwrite"][..], 2), (&["--on-full", "overwrite", "--no-returns"], 1)]
    {
        let recording = Recording::with(options);
        let lost = recording.lost("overwritten") + recording.lost("full");
        assert_eq!(recording.records + lost, records_a_call * recording.made);
        // 32 chunks of 4,096 records, and the threads end with their last ones.
        assert!((1..=32 * 4096).contains(&recording.records), "{}", recording.records);
        recording.assert_no_other_loss();
    }
}

/// With returns left out, a record is a call: what the report says and what is lost make up all calls.
#[test]
fn calls_and_losses_make_up_the_calls_that_were_made() {
    let recording = Recording::with(&["--on-full", "overwrite", "--no-returns"]);
    let lost = recording.lost("overwritten") + recording.lost("full");
    assert_eq!(recording.calls + lost, recording.made);
    assert!(lost > recording.made / 2, "the loss is most of it, and counted: {lost}");
}
