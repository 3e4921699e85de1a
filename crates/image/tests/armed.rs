//! Armed functions do what they did before, and every call of them is counted.
//!
//! A program calls functions of many shapes, once as it is and once with all of them armed; what it prints must not differ.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use common::{Directory, fixture, named, run, text};
use trapline_abi::agent::{ENTRY_CODE, StubPlace};
use trapline_engine::Addr;
use trapline_image::{ArmRequest, Armed, Entries, Image, Reason, Rung, Shim, Verdict};

/// Somewhere in the lower 2 GiB, where the program has nothing.
const STUBS_AT: Addr = Addr::new(0x2000_0000);

struct Shapes {
    directory: Directory,
    program: PathBuf,
    image: Image,
}

impl Shapes {
    fn build() -> Self {
        let directory = Directory::new();
        let program = directory.path("shapes");
        run("gcc", &["-O1", "-no-pie", "-fno-pie", &fixture("harness.c"), &fixture("shapes.S"), "-o", text(&program)]);
        let image = Image::open(&program).expect("it is an ELF file");
        Self { directory, program, image }
    }

    fn entry(&self, name: &str) -> Addr {
        let output = Command::new("nm").arg(&self.program).output().expect("binutils are there");
        let output = String::from_utf8(output.stdout).expect("names are ASCII");
        let line = output.lines().find(|line| line.split(' ').nth(2) == Some(name)).expect("the harness has it");
        Addr::new(u64::from_str_radix(&line[..16], 16).expect("nm prints addresses"))
    }

    /// The functions of the fixture.
    fn selected(&self) -> Vec<usize> {
        let first = self.entry("plain").value();
        let last = self.entry("has_bare_cold_part").value();
        let functions = self.image.functions().iter().enumerate();
        functions.filter(|(_, function)| (first..=last).contains(&function.address)).map(|(index, _)| index).collect()
    }

    fn arm(&self, enter: &str, enter_keep_flags: &str) -> Armed {
        self.arm_with_shims(enter, enter_keep_flags, &self.selected(), &[])
    }

    fn arm_with_shims(&self, enter: &str, enter_keep_flags: &str, selected: &[usize], shims: &[Shim]) -> Armed {
        let entries = Entries {
            enter: self.entry(enter),
            enter_keep_flags: self.entry(enter_keep_flags),
            ..Entries::all_at(self.entry("keeps_flags"))
        };
        self.arm_for(entries, true, selected, shims)
    }

    /// Returns are not seen.
    fn arm_points(&self, point: &str, point_keep_flags: &str) -> Armed {
        let entries = Entries {
            point: self.entry(point),
            point_keep_flags: self.entry(point_keep_flags),
            ..Entries::all_at(Addr::new(0))
        };
        self.arm_for(entries, false, &self.selected(), &[])
    }

    fn arm_for(&self, entries: Entries, returns: bool, selected: &[usize], shims: &[Shim]) -> Armed {
        self.image.arm(&ArmRequest {
            selected,
            bias: 0,
            stubs_at: STUBS_AT,
            entries,
            first_site: 0,
            returns,
            limit_depth: false,
            shims,
            diverted: &[],
        })
    }

    /// What the program prints: results, and hits by function.
    fn run(&self, armed: Option<&Armed>) -> (Vec<String>, BTreeMap<String, u32>) {
        let mut command = Command::new(&self.program);
        if let Some(armed) = armed {
            let path = self.directory.path("patch");
            fs::write(&path, patch(armed)).expect("the directory is writable");
            command.arg(path);
        }
        let output = command.output().expect("it was just compiled");
        assert!(output.status.success(), "{:?}", output.status);
        let output = String::from_utf8(output.stdout).expect("it prints ASCII");
        let (hits, results): (Vec<_>, Vec<_>) = output.lines().partition(|line| line.starts_with("hits"));
        let hit = |line: &str| {
            let mut words = line.split(' ').skip(1).map(|word| word.parse::<usize>().expect("a number"));
            let (id, count) = (words.next().expect("an id"), words.next().expect("a count"));
            (self.image.functions()[id].name.clone(), u32::try_from(count).expect("a few"))
        };
        (results.into_iter().map(str::to_owned).collect(), hits.into_iter().map(hit).collect())
    }

    fn verdict(&self, name: &str) -> &Verdict {
        &named(&self.image, name).1.verdict
    }

    fn rung(&self, name: &str) -> Rung {
        named(&self.image, name).1.plan().unwrap_or_else(|| panic!("{name}: {:?}", self.verdict(name))).rung
    }
}

fn patch(armed: &Armed) -> String {
    let line = |what: &str, at: Addr, bytes: &[u8]| {
        let hex = bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
        format!("{what} {:x} {hex}\n", at.value())
    };
    let writes = armed.writes.iter().map(|write| line("write", write.at, &write.new));
    line("stubs", STUBS_AT, &armed.stubs) + &writes.collect::<String>()
}

#[test]
fn armed_functions_return_what_they_returned_and_every_call_is_counted() {
    let shapes = Shapes::build();
    let armed = shapes.arm("loses_flags", "keeps_flags");
    let refused: Vec<_> =
        armed.refused.iter().map(|(index, reason)| (&*shapes.image.functions()[*index].name, reason.code())).collect();
    assert_eq!(refused, [("short_loop_to_offset_one", "jump-into-window")]);

    let (plain, no_hits) = shapes.run(None);
    let (results, hits) = shapes.run(Some(&armed));
    assert_eq!(results, plain);
    assert!(no_hits.is_empty());
    for (name, count) in [
        // Four calls each; the four numbers of turns of what loops to its head; what is tail-called besides; what is called once more.
        ("plain", 4),
        ("early_call", 4),
        ("only_ret", 4),
        ("crowded", 4),
        ("loop_to_head", 3 + 10 + 1 + 6),
        ("loop_into_window", 4),
        ("loop_to_offset_one", 4),
        ("table_into_window", 4),
        ("addresses_into_window", 4),
        ("short_function", 8),
        ("short_tail_call", 4),
        ("has_back_door", 4),
        ("uses_back_door", 4),
        ("tail_calls", 4),
        ("only_tail_called", 4),
        ("has_cold_part", 5),
        ("has_bare_cold_part", 5),
        ("profiled", 4),
        ("profiled_by_word", 4),
        ("profiled_and_short", 4),
        ("profiled_and_crowded", 4),
        ("profiled_loop", 4),
        ("call_first", 4),
    ] {
        assert_eq!(hits.get(name), Some(&count), "{name}");
    }
    assert_eq!(hits.len(), armed.sites.len(), "every site was entered, and nothing else: {hits:?}");
}

#[test]
fn functions_are_led_through_a_detour_whether_they_are_selected_or_not() {
    let shapes = Shapes::build();
    let (plain, _) = shapes.run(None);
    let index = |name: &str| named(&shapes.image, name).0;
    let shim = |name: &str| Shim {
        function: index(name),
        through: shapes.entry("through"),
        helpers: [Some(index("early_call")), Some(index("with_nop")), None],
    };
    let shims = [shim("with_nop"), shim("rip_relative")];
    let mut selected = shapes.selected();
    selected.retain(|function| *function != index("rip_relative") && *function != index("early_call"));
    let armed = shapes.arm_with_shims("loses_flags", "keeps_flags", &selected, &shims);
    let (results, hits) = shapes.run(Some(&armed));
    assert_eq!(results, plain);
    let detours = hits.get(&shapes.image.functions()[0].name);
    assert_eq!(detours, Some(&8), "four calls each");
    assert_eq!(hits.get("with_nop"), Some(&4));
    assert_eq!(hits.get("rip_relative"), None, "it is led through, and not recorded");
    assert_eq!(hits.len() - 1, armed.sites.len());
    assert!(armed.stubs.len() <= shapes.image.stub_bytes_bound(&selected, &shims));
    // The helpers are entered where they are not recorded.
    let off = armed.sites.iter().find(|site| site.function == index("with_nop")).expect("it is armed").off;
    let helpers = [shapes.entry("early_call"), off, Addr::new(0)].map(|helper| helper.value().to_le_bytes()).concat();
    let found = armed.stubs.windows(helpers.len()).filter(|bytes| *bytes == helpers).count();
    assert_eq!(found, 2, "one for each detour");
}

/// The table at an area's end: offset in the area, and address in the program.
fn places(armed: &Armed) -> Vec<(usize, i32)> {
    let word = |at: usize| u32::from_le_bytes(*armed.stubs[at..].first_chunk().expect("the area is as long"));
    let (at, count) = (word(16) as usize, word(20) as usize);
    assert_eq!(at + count * size_of::<StubPlace>(), armed.stubs.len());
    (0..count).map(|index| at + index * 8).map(|at| (word(at) as usize, word(at + 4).cast_signed())).collect()
}

#[test]
fn every_instruction_of_a_stub_stands_for_one_of_the_program() {
    let shapes = Shapes::build();
    let armed = shapes.arm("keeps_flags", "keeps_flags");
    let places = places(&armed);
    assert!(places.is_sorted_by(|one, next| one.0 < next.0), "{places:?}");
    assert_eq!(places.first(), Some(&(32, ENTRY_CODE)), "jumps to entries come first");
    let code_of = |at: Addr| {
        let offset = usize::try_from(at.distance_from(STUBS_AT)).expect("stubs begin there");
        let place = places.iter().rev().find(|place| place.0 <= offset).expect("the first is at the beginning");
        STUBS_AT.offset(i64::from(place.1))
    };
    let (mut same, mut all) = (0, 0);
    for site in &armed.sites {
        let plan = shapes.image.functions()[site.function].plan().expect("it is armed");
        let (window, end) = (plan.window_at, plan.window_at + u64::from(plan.window_bytes));
        assert_eq!(code_of(site.on).value(), window);
        assert_eq!(code_of(site.off).value(), window);
        let off = usize::try_from(site.off.distance_from(STUBS_AT)).expect("stubs begin there");
        let distance = i32::from_le_bytes(*armed.stubs[off - 4..].first_chunk().expect("the stub goes on"));
        let leads_to = site.off.offset(i64::from(distance));
        let stub_end = if plan.entry_only.is_some() {
            off + 64
        } else {
            // What enters the function is at the stub's end: as at the window's beginning, and once it has pushed, as at an entry's.
            assert_eq!(code_of(leads_to).value(), window);
            assert_eq!(code_of(leads_to.after(6)), STUBS_AT.offset(i64::from(ENTRY_CODE)));
            usize::try_from(leads_to.distance_from(STUBS_AT)).expect("it is one of the stubs")
        };
        for (at, code) in places.iter().skip_while(|place| place.0 < off).take_while(|place| place.0 < stub_end) {
            let code = STUBS_AT.offset(i64::from(*code));
            if (window..end).contains(&code.value()) {
                all += 1;
                same += usize::from(armed.stubs[*at] == shapes.image.code(code)[0]);
            }
        }
    }
    // Most instructions are moved as they are.
    assert!(all > armed.sites.len() && same * 10 > all * 8, "{same} of {all}");
}

#[test]
fn entries_that_lose_flags_would_be_seen() {
    let shapes = Shapes::build();
    let (plain, _) = shapes.run(None);
    for armed in [shapes.arm("keeps_flags", "loses_flags"), shapes.arm_points("keeps_flags", "loses_flags")] {
        let (results, _) = shapes.run(Some(&armed));
        let differ: Vec<_> =
            plain.iter().zip(&results).filter(|(plain, armed)| plain != armed).map(|(plain, _)| plain).collect();
        let names: Vec<_> = differ.iter().map(|line| line.split(' ').next().unwrap_or_default()).collect();
        assert_eq!(names, ["reads_carry", "reads_carry_later"]);
    }
}

#[test]
fn functions_whose_returns_are_not_seen_return_what_they_returned() {
    let shapes = Shapes::build();
    let (plain, _) = shapes.run(None);
    let (results, hits) = shapes.run(Some(&shapes.arm_points("loses_flags", "keeps_flags")));
    assert_eq!(results, plain);
    assert_eq!((hits["plain"], hits["crowded"]), (4, 4));
}

#[test]
fn each_shape_gets_its_rung() {
    let shapes = Shapes::build();
    for (name, rung) in [
        ("plain", Rung::Window),
        ("with_nop", Rung::Nop),
        ("one_instruction", Rung::OneInstruction),
        ("loop_to_head", Rung::Window),
        ("short_function", Rung::Window),
        ("only_ret", Rung::Window),
        ("loop_to_offset_one", Rung::Window),
    ] {
        assert_eq!(shapes.rung(name), rung, "{name}");
    }
    let mut pads = Vec::new();
    for name in ["loop_into_window", "table_into_window", "addresses_into_window", "crowded", "has_back_door"] {
        let Rung::ShortJump { pad } = shapes.rung(name) else { panic!("{name}: {:?}", shapes.verdict(name)) };
        pads.extend(pad..pad + 5);
    }
    let count = pads.len();
    pads.sort_unstable();
    pads.dedup();
    assert_eq!(pads.len(), count, "no byte serves two functions");
    let redirects = |name| named(&shapes.image, name).1.plan().is_some_and(trapline_image::Plan::redirects);
    assert!(redirects("loop_to_offset_one") && !redirects("plain"));
    assert!(matches!(shapes.verdict("short_loop_to_offset_one"), Verdict::Untraced(Reason::JumpIntoWindow { .. })));
    let endbr = named(&shapes.image, "with_endbr").1;
    assert_eq!(endbr.plan().map(|plan| plan.window_at), Some(endbr.address + 4));
}

#[test]
fn a_function_that_calls_the_profiler_first_is_armed_behind_that() {
    let shapes = Shapes::build();
    for (name, skipped) in [
        ("profiled", 5),
        ("profiled_by_word", 4 + 6),
        ("profiled_and_short", 6),
        // There is no room behind the call, or not everyone who gets there has just been called: the call itself is moved.
        ("profiled_and_crowded", 0),
        ("profiled_loop", 0),
        // Another call is the function's own.
        ("call_first", 0),
    ] {
        let function = named(&shapes.image, name).1;
        let window_at = function.plan().map(|plan| plan.window_at - function.address);
        assert_eq!(window_at, Some(skipped), "{name}");
    }
}

#[test]
fn what_looks_at_its_return_address_is_entry_only() {
    let shapes = Shapes::build();
    let entry_only: Vec<_> = shapes
        .selected()
        .into_iter()
        .map(|index| &shapes.image.functions()[index])
        .filter(|function| function.is_entry_only())
        .map(|function| &*function.name)
        .collect();
    assert_eq!(entry_only, ["loads_return_address", "pops_return_address", "loads_without_cfi"]);
    let start = named(&shapes.image, "_start").1;
    assert_eq!(start.plan().and_then(|plan| plan.entry_only), Some(Reason::NoReturnAddress));
}

#[test]
fn writes_expect_what_the_file_has_and_do_not_overlap() {
    let shapes = Shapes::build();
    let armed = shapes.arm("keeps_flags", "keeps_flags");
    assert!(!armed.writes.is_empty());
    for write in &armed.writes {
        assert_eq!(write.expected.len(), write.new.len());
        assert!(shapes.image.code(write.at).starts_with(&write.expected), "{}", write.at);
        assert_ne!(write.expected, write.new);
    }
    for pair in armed.writes.windows(2) {
        assert!(pair[0].at.after(pair[0].new.len()) <= pair[1].at, "{} {}", pair[0].at, pair[1].at);
    }
    for site in &armed.sites {
        let id_at = usize::try_from(site.on.distance_from(STUBS_AT)).expect("stubs begin there") - 4;
        assert_eq!(armed.stubs[id_at..id_at + 4], site.id.to_le_bytes());
        assert_eq!(site.off, site.on.after(5));
    }
    assert!(armed.stubs.len() <= shapes.image.stub_bytes_bound(&shapes.selected(), &[]));
    assert_eq!(armed, shapes.arm("keeps_flags", "keeps_flags"), "the same again");
}

#[test]
fn a_stripped_file_has_the_same_functions_without_their_names() {
    let shapes = Shapes::build();
    let path = shapes.directory.path("stripped");
    run("strip", &["-o", text(&path), text(&shapes.program)]);
    let stripped = Image::open(&path).expect("it is an ELF file");
    let addresses = |image: &Image, prefix: &str| -> Vec<u64> {
        let functions = image.functions().iter();
        functions.filter(|function| function.name.starts_with(prefix)).map(|function| function.address).collect()
    };
    let (_, plain) = named(&shapes.image, "plain");
    let (_, cold) = named(&shapes.image, "has_bare_cold_part");
    let of_fixture: Vec<_> =
        addresses(&shapes.image, "").into_iter().filter(|at| (plain.address..=cold.address).contains(at)).collect();
    let missing: Vec<_> = of_fixture.iter().filter(|at| !addresses(&stripped, "stripped+0x").contains(at)).collect();
    // The one that has no unwind information either, and no name.
    assert_eq!(missing, [&named(&shapes.image, "loads_without_cfi").1.address]);
    assert_eq!(
        addresses(&shapes.image, "shapes+0x"),
        [],
        "all functions have names here, and the parts of functions are none"
    );
    let left_out: Vec<_> = stripped.left_out().iter().map(|other| other.why).collect();
    assert!(left_out.contains(&trapline_image::NoFunction::FrameAtEntry), "{left_out:?}");
    assert!(left_out.contains(&trapline_image::NoFunction::OnlyJumpedTo), "{left_out:?}");
}

#[test]
fn names_come_from_separate_debug_files_that_belong_to_the_file() {
    let shapes = Shapes::build();
    let (stripped, debug) = (shapes.directory.path("stripped"), shapes.directory.path("shapes.debug"));
    run("objcopy", &["--only-keep-debug", text(&shapes.program), text(&debug)]);
    let link = format!("--add-gnu-debuglink={}", text(&debug));
    run("objcopy", &["--strip-all", &link, text(&shapes.program), text(&stripped)]);
    let names = |path: &Path| -> Vec<String> {
        let image = Image::open(path).expect("it is an ELF file");
        image.functions().iter().map(|function| function.name.clone()).collect()
    };
    assert!(names(&stripped).contains(&"table_into_window".to_owned()));
    assert_eq!(names(&stripped), names(&shapes.program));

    // Another file by that name is not used.
    let mut bytes = fs::read(&debug).expect("it is there");
    bytes.push(0);
    fs::write(&debug, bytes).expect("it is writable");
    assert!(!names(&stripped).contains(&"table_into_window".to_owned()));
}

#[test]
fn names_come_from_the_compressed_file_within_the_file() {
    let shapes = Shapes::build();
    let (stripped, debug) = (shapes.directory.path("stripped"), shapes.directory.path("embedded"));
    run("objcopy", &["--only-keep-debug", text(&shapes.program), text(&debug)]);
    run("xz", &[text(&debug)]);
    let section = format!(".gnu_debugdata={}.xz", text(&debug));
    run("strip", &["-o", text(&stripped), text(&shapes.program)]);
    run("objcopy", &["--add-section", &section, text(&stripped)]);
    let image = Image::open(&stripped).expect("it is an ELF file");
    assert_eq!(named(&image, "table_into_window").1.address, named(&shapes.image, "table_into_window").1.address);
}
