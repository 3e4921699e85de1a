//! The command line: which verb, and what of it the user wants left out.
//!
//! Owns [`Verb`], [`Selection`] and the help text. Parsing is pure: the caller says whether this is CI, so that the rule
//! "nothing is left out under CI" is a property of the parser, and no later code can forget it.

use crate::manual;
use crate::package::Package;

/// What `cargo xtask help` prints.
pub(crate) const HELP: &str = "\
Usage: cargo xtask VERB

  setup [--skip-i686]           make a Debian machine ready for `test`: install what is missing, as root;
                                otherwise print the commands that would
  test [--quick] [--skip-i686]  everything that must hold: lints, tests, models, stress and fidelity, 64 and 32 bit
  lint [--skip-i686]            formatting, clippy, documentation and the text rules
  bench [ARGUMENTS]             the benchmarks; arguments go to `cargo bench`
  kernel-test [OPTIONS]         the engine in a kernel of its own, in QEMU, 64 and 32 bit: --arch x86_64|i386,
                                --accel tcg|kvm, --quick (fewer pokes), --json (one line a run); --only WORDS takes
                                the jobs with these words in their names, --times N runs each job so often
  fidelity [--m32] [PROGRAM...] real programs under trapline and under callgrind: every function was called as often as
                                the trace says
  consumers [READER...]         the viewers, profilers and databases that read our exports find the calls and times of `trapline report`: perfetto, speedscope,
                                profiler-cli, pprof, uftrace, babeltrace2, duckdb, chdb, spark, sql; installs what is missing
  manual [--command FILE] [--write] [PAGE...]
                                the manual's pages are followed, command by command, with what the tests have built or another command; --write writes
                                its reference of the verbs anew
  newcomer                      the README's first steps on a fresh Debian system, timed: install, record, report, open in a viewer; needs root
  pages [--measure | CHECK...]  the page of `trapline html` in Chromium: its numbers are the report's; clicks, search, zooms, keys, themes, small screens,
                                names for screen readers; controls that have to be found. --measure: how long ten million calls take to open, and
                                how many frames a second there are while the timeline moves
  screenshots                   the manual's pictures of `trapline html`, `trapline top` and a live fix, taken of real runs: writes them below docs/pictures
  bench-peers [--quick|--full] [--only PEER]
                                trapline beside uftrace, XRay, bpftrace and Frida, on the same work: writes docs/benchmarks.md. --quick takes fewer calls, and
                                --only one tracer; both print instead of writing. --full reports on ten times as many calls
  package --deb|--tarball|--check|--library FOLDER [--m32]
                                what people install, made of the last commit: Debian packages, or an archive; --check installs, uses and removes them, and
                                builds twice to compare. --library puts the library for C below a folder
  help                          this text

  --quick      leave out what comes after the tests: models, stress at 64 bit, fidelity, consumers and the kernel
  --skip-i686  leave out what needs a 32-bit compiler, target or kernel
  Both are refused under CI=true.
";

/// A parsed command line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Print [`HELP`].
    Help,
    /// Install what the tests need.
    Setup(Selection),
    /// Run every step.
    Test(Selection),
    /// Run the steps that only read the source.
    Lint(Selection),
    /// Run the benchmarks with these arguments.
    Bench(Vec<String>),
    /// Run the testbed kernel.
    KernelTest(KernelTest),
    /// Compare traces with callgrind's counts, of these programs or of all.
    Fidelity { programs: Vec<String>, is_narrow: bool },
    /// Have these tools read our exports, or all.
    Consumers(Vec<String>),
    /// Drive the page of `trapline html`: all checks, or these.
    Pages { checks: Vec<String>, is_measured: bool },
    /// Take the manual's pictures.
    Screenshots,
    /// Measure trapline beside its peers.
    BenchPeers(BenchPeers),
    /// Follow the manual.
    Manual(manual::Asked),
    /// Follow the README on a fresh system.
    Newcomer,
    /// Make what people install.
    Package(Package),
}

/// What of `bench-peers` the user asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct BenchPeers {
    /// Fewer calls and rounds: to see that everything works.
    pub(crate) quick: bool,
    /// Reports on ten times as many calls.
    pub(crate) full: bool,
    /// Beside trapline and the floor, only this tracer.
    pub(crate) only: Option<String>,
}

/// What of `kernel-test` the user asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct KernelTest {
    /// Only this width.
    pub(crate) arch: Option<Arch>,
    /// Not what the machine is best at.
    pub(crate) accelerator: Option<Accelerator>,
    /// Fewer pokes.
    pub(crate) quick: bool,
    /// One line of JSON a run, and no tables.
    pub(crate) json: bool,
    /// Only jobs with these words in their names.
    pub(crate) only: Option<String>,
    /// How often each job is run; once if not said.
    pub(crate) times: Option<u32>,
}

/// A width of the testbed kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arch {
    /// 64 bit.
    X86_64,
    /// 32 bit.
    I386,
}

impl Arch {
    /// Both widths.
    pub(crate) const ALL: [Self; 2] = [Self::X86_64, Self::I386];

    /// As on the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::I386 => "i386",
        }
    }
}

/// What runs the testbed's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// QEMU's translator.
    Tcg,
    /// The processor.
    Kvm,
}

/// What the user asked to leave out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Selection {
    /// Leave out the proofs that come after the tests.
    pub(crate) quick: bool,
    /// Leave out whatever needs 32-bit support.
    pub(crate) skip_i686: bool,
}

/// Parses the arguments after the program's name.
///
/// # Errors
/// A sentence for the user: an unknown verb or option, or an option that would leave something out under CI.
pub(crate) fn parse(mut arguments: impl Iterator<Item = String>, under_ci: bool) -> Result<Verb, String> {
    let Some(verb) = arguments.next() else {
        return Err("no verb".to_owned());
    };
    match verb.as_str() {
        "help" | "--help" | "-h" => Ok(Verb::Help),
        "setup" => selection(arguments, &["--skip-i686"], under_ci).map(Verb::Setup),
        "test" => selection(arguments, &["--quick", "--skip-i686"], under_ci).map(Verb::Test),
        "lint" => selection(arguments, &["--skip-i686"], under_ci).map(Verb::Lint),
        "bench" => Ok(Verb::Bench(arguments.collect())),
        "kernel-test" => kernel_test(arguments).map(Verb::KernelTest),
        "fidelity" => {
            let (options, programs): (Vec<String>, Vec<String>) = arguments.partition(|word| word == "--m32");
            Ok(Verb::Fidelity { programs, is_narrow: !options.is_empty() })
        }
        "consumers" => Ok(Verb::Consumers(arguments.collect())),
        "pages" => {
            let (options, checks): (Vec<String>, Vec<String>) = arguments.partition(|word| word == "--measure");
            Ok(Verb::Pages { checks, is_measured: !options.is_empty() })
        }
        "bench-peers" => bench_peers(arguments).map(Verb::BenchPeers),
        "manual" => follow(arguments).map(Verb::Manual),
        "newcomer" => alone(Verb::Newcomer, arguments),
        "screenshots" => alone(Verb::Screenshots, arguments),
        "package" => package(arguments).map(Verb::Package),
        unknown => Err(format!("unknown verb `{unknown}`")),
    }
}

/// A verb that takes nothing.
fn alone(verb: Verb, mut arguments: impl Iterator<Item = String>) -> Result<Verb, String> {
    arguments.next().map_or(Ok(verb), |word| Err(format!("unknown option `{word}`")))
}

/// Parses the options of one verb, of which only those in `known` mean something.
fn selection(arguments: impl Iterator<Item = String>, known: &[&str], under_ci: bool) -> Result<Selection, String> {
    let mut selection = Selection::default();
    for argument in arguments {
        if !known.contains(&argument.as_str()) {
            return Err(format!("unknown option `{argument}`"));
        }
        if under_ci {
            return Err(format!("`{argument}` is refused under CI=true, where nothing is left out"));
        }
        match argument.as_str() {
            "--quick" => selection.quick = true,
            _ => selection.skip_i686 = true,
        }
    }
    Ok(selection)
}

fn kernel_test(mut arguments: impl Iterator<Item = String>) -> Result<KernelTest, String> {
    let mut asked = KernelTest::default();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => asked.quick = true,
            "--json" => asked.json = true,
            "--arch" => {
                let name = arguments.next().unwrap_or_default();
                let arch = Arch::ALL.into_iter().find(|arch| arch.name() == name);
                asked.arch = Some(arch.ok_or_else(|| format!("`--arch {name}` is neither x86_64 nor i386"))?);
            }
            "--accel" => match arguments.next().as_deref() {
                Some("tcg") => asked.accelerator = Some(Accelerator::Tcg),
                Some("kvm") => asked.accelerator = Some(Accelerator::Kvm),
                other => return Err(format!("`--accel {}` is neither tcg nor kvm", other.unwrap_or_default())),
            },
            "--only" => asked.only = Some(arguments.next().ok_or("`--only` needs words of a job's name")?),
            "--times" => {
                let times = arguments.next().unwrap_or_default();
                let count = times.parse().ok().filter(|count| *count > 0);
                asked.times = Some(count.ok_or_else(|| format!("`--times {times}` is no number of times"))?);
            }
            _ => return Err(format!("unknown option `{argument}`")),
        }
    }
    Ok(asked)
}

fn bench_peers(mut arguments: impl Iterator<Item = String>) -> Result<BenchPeers, String> {
    let mut asked = BenchPeers::default();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => asked.quick = true,
            "--full" => asked.full = true,
            "--only" => asked.only = Some(arguments.next().ok_or("`--only` needs a tracer's name")?),
            _ => return Err(format!("unknown option `{argument}`")),
        }
    }
    if asked.quick && asked.full {
        return Err("`--quick` and `--full` contradict each other".to_owned());
    }
    Ok(asked)
}

fn follow(mut arguments: impl Iterator<Item = String>) -> Result<manual::Asked, String> {
    let mut asked = manual::Asked::default();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--write" => asked.write = true,
            "--command" => asked.command = Some(arguments.next().ok_or("`--command` needs a file")?.into()),
            option if option.starts_with('-') => return Err(format!("unknown option `{option}`")),
            page => asked.pages.push(page.to_owned()),
        }
    }
    Ok(asked)
}

fn package(mut arguments: impl Iterator<Item = String>) -> Result<Package, String> {
    let package = match arguments.next().as_deref() {
        Some("--deb") => Package::Deb,
        Some("--tarball") => Package::Tarball,
        Some("--check") => Package::Check,
        Some("--library") => {
            let prefix = arguments.next().ok_or("`--library` needs the folder where it goes")?;
            let next = arguments.next();
            if next.as_ref().is_some_and(|word| word != "--m32") {
                return Err(format!("unknown option `{}`", next.unwrap_or_default()));
            }
            Package::Library { prefix, is_narrow: next.is_some() }
        }
        Some(unknown) => return Err(format!("unknown option `{unknown}`")),
        None => return Err("`package` needs --deb, --tarball, --check or --library FOLDER".to_owned()),
    };
    match arguments.next() {
        Some(more) => Err(format!("one word too many: `{more}`")),
        None => Ok(package),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str, under_ci: bool) -> Result<Verb, String> {
        parse(line.split_whitespace().map(str::to_owned), under_ci)
    }

    #[test]
    fn each_verb_is_recognised() {
        assert_eq!(parse_line("help", false), Ok(Verb::Help));
        assert_eq!(parse_line("--help", false), Ok(Verb::Help));
        assert_eq!(parse_line("setup", false), Ok(Verb::Setup(Selection::default())));
        assert_eq!(parse_line("test", true), Ok(Verb::Test(Selection::default())));
        assert_eq!(parse_line("lint", true), Ok(Verb::Lint(Selection::default())));
    }

    #[test]
    fn options_of_test_combine_in_any_order() {
        let both = Selection { quick: true, skip_i686: true };
        assert_eq!(parse_line("test --quick --skip-i686", false), Ok(Verb::Test(both)));
        assert_eq!(parse_line("test --skip-i686 --quick", false), Ok(Verb::Test(both)));
    }

    #[test]
    fn nothing_may_be_left_out_under_ci() {
        for line in ["test --skip-i686", "test --quick", "lint --skip-i686", "setup --skip-i686"] {
            let refusal = parse_line(line, true).expect_err(line);
            assert!(refusal.contains("refused under CI=true"), "{line}: {refusal}");
            assert!(parse_line(line, false).is_ok(), "{line} is meant for a developer's machine");
        }
    }

    #[test]
    fn unknown_words_are_errors() {
        assert_eq!(parse_line("", false), Err("no verb".to_owned()));
        assert_eq!(parse_line("tset", false), Err("unknown verb `tset`".to_owned()));
        assert_eq!(parse_line("test --fast", false), Err("unknown option `--fast`".to_owned()));
        assert_eq!(parse_line("lint --quick", false), Err("unknown option `--quick`".to_owned()));
    }

    #[test]
    fn kernel_test_takes_a_width_and_an_accelerator() {
        let (arch, accelerator) = (Some(Arch::I386), Some(Accelerator::Tcg));
        let asked = KernelTest { arch, accelerator, quick: true, ..KernelTest::default() };
        assert_eq!(parse_line("kernel-test --arch i386 --quick --accel tcg", true), Ok(Verb::KernelTest(asked)));
        assert!(parse_line("kernel-test --arch arm", false).is_err());
        assert!(parse_line("kernel-test --accel", false).is_err());
        assert!(parse_line("kernel-test --fast", false).is_err());
    }

    #[test]
    fn kernel_test_takes_one_job_and_repeats_it() {
        let asked = KernelTest { only: Some("trace".to_owned()), times: Some(60), ..KernelTest::default() };
        assert_eq!(parse_line("kernel-test --only trace --times 60", true), Ok(Verb::KernelTest(asked)));
        assert!(parse_line("kernel-test --times 0", false).is_err());
        assert!(parse_line("kernel-test --times often", false).is_err());
        assert!(parse_line("kernel-test --only", false).is_err());
    }

    #[test]
    fn package_makes_one_thing() {
        assert_eq!(parse_line("package --deb", true), Ok(Verb::Package(Package::Deb)));
        let library = Package::Library { prefix: "out".to_owned(), is_narrow: true };
        assert_eq!(parse_line("package --library out --m32", true), Ok(Verb::Package(library)));
        for line in
            ["package", "package --rpm", "package --deb --tarball", "package --library", "package --library out -m32"]
        {
            assert!(parse_line(line, false).is_err(), "{line}");
        }
    }

    #[test]
    fn bench_peers_takes_one_length_and_one_tracer() {
        let asked = BenchPeers { quick: true, full: false, only: Some("frida".to_owned()) };
        assert_eq!(parse_line("bench-peers --only frida --quick", true), Ok(Verb::BenchPeers(asked)));
        assert!(parse_line("bench-peers --quick --full", true).is_err());
        assert!(parse_line("bench-peers --only", true).is_err());
        assert!(parse_line("bench-peers frida", true).is_err());
    }

    #[test]
    fn manual_takes_pages_and_a_command() {
        let asked = manual::Asked {
            command: Some("target/debug/trapline".into()),
            write: false,
            pages: vec!["sql.md".to_owned()],
        };
        assert_eq!(parse_line("manual sql.md --command target/debug/trapline", true), Ok(Verb::Manual(asked)));
        assert!(parse_line("manual --all", true).is_err());
        assert!(parse_line("manual --command", true).is_err());
        assert_eq!(parse_line("newcomer", false), Ok(Verb::Newcomer));
        assert_eq!(parse_line("screenshots", false), Ok(Verb::Screenshots));
        assert_eq!(parse_line("screenshots all", false), Err("unknown option `all`".to_owned()));
        assert!(parse_line("newcomer --fast", false).is_err());
    }

    #[test]
    fn bench_hands_its_arguments_on_untouched() {
        let words = ["--bench", "poke", "--", "--quick"].map(str::to_owned).to_vec();
        assert_eq!(parse_line("bench --bench poke -- --quick", true), Ok(Verb::Bench(words)));
    }
}
