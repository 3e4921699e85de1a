//! Processes: children by every way, other images, daemons, job control.

use trapline_testsuite::{program::Program, transparency::Check};

#[test]
fn forked_children_return_through_their_parents_frames() {
    Check::of(Program::of(&["fork.c"])).run();
}

#[test]
fn children_by_vfork_spawn_system_and_popen_are_recorded() {
    Check::of(Program::of(&["launches.c"])).run();
}

#[test]
fn a_program_that_replaces_itself_is_recorded_on() {
    Check::of(Program::of(&["exec_self.c"]).arguments(&["leader"])).run();
}

#[test]
fn a_thread_that_is_not_the_leader_replaces_the_program() {
    Check::of(Program::of(&["exec_self.c"]).arguments(&["thread"])).run();
}

#[test]
fn a_daemon_outlives_its_parent() {
    Check::of(Program::of(&["daemon.c"])).run();
}

#[test]
fn wait_sees_own_children_and_no_others() {
    Check::of(Program::of(&["waits.c"])).run();
}

#[test]
fn children_stop_and_go_on_and_are_killed_when_they_have_only_just_begun() {
    // They are killed anywhere, in the middle of an entry too.
    Check::of(Program::of(&["stops.c"])).leaves_anywhere().run();
}
