// backtrace() at every single instruction of traced functions: the lists of frames are those that there are without anybody. The trap flag of the
// processor interrupts each thread after each instruction, and every list that was seen is printed once.
#include "check.h"
#include <dlfcn.h>
#include <execinfo.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>

// A thread looks at so many instructions, and the next one at those behind them. The trap is fatal where it is blocked, as it is for a moment after
// a few thousand calls.
enum { LOOKS = 4, LISTS = 1000, FRAMES = 60, TRAP_FLAG = 0x100 };

static long steps, first_look, calls;
static int is_over;
static char *lists[LISTS];
static int list_count;

static void keep(const char *list) {
    for (int index = 0; index < list_count; index++) {
        if (strcmp(lists[index], list) == 0) return;
    }
    EXPECT(list_count < LISTS);
    lists[list_count++] = strdup(list);
}

TRACED void look(void) {
    void *frames[FRAMES];
    char list[FRAMES * 40] = "";
    int count = backtrace(frames, FRAMES);
    // At 32 bit compilers say less of how to unwind from everywhere.
    EXPECT(count > (sizeof(long) == 8 ? 5 : 3));
    for (int frame = 0; frame < count; frame++) {
        // This function, the handler, what it returns to, what was interrupted: that one is no return address.
        char *address = (char *)frames[frame] - (frame != 3);
        Dl_info info;
        const char *name = dladdr(address, &info) && info.dli_sname ? info.dli_sname : "?";
#ifdef __i386__
        // In what functions ask where they are: a function whose beginning is moved knows it without.
        if (frame == 3 && *name == '?') return;
#endif
        snprintf(list + strlen(list), 40, " %s", name);
    }
    keep(list);
}

void on_trap(int signal, siginfo_t *info, void *context) {
    (void)signal;
    (void)info;
    long step = steps++;
    if (step >= first_look) look();
    if (step + 1 == first_look + LOOKS) ((ucontext_t *)context)->uc_mcontext.gregs[REG_EFL] &= ~TRAP_FLAG;
}

// They set and clear the flag. In assembly, so that an unwinder finds its way at each instruction.
void trap_on(void);
void trap_off(void);
__asm__(".macro trap name, operation, bits\n"
        "    .type \\name, @function\n"
        "    .globl \\name\n"
        "\\name:\n"
        "    .cfi_startproc\n"
#ifdef __i386__
        "    pushfd\n"
        "    .cfi_adjust_cfa_offset 4\n"
        "    \\operation dword ptr [esp], \\bits\n"
        "    popfd\n"
        "    .cfi_adjust_cfa_offset -4\n"
#else
        "    pushfq\n"
        "    .cfi_adjust_cfa_offset 8\n"
        "    \\operation qword ptr [rsp], \\bits\n"
        "    popfq\n"
        "    .cfi_adjust_cfa_offset -8\n"
#endif
        "    ret\n"
        "    .cfi_endproc\n"
        "    .size \\name, . - \\name\n"
        ".endm\n"
        ".intel_syntax noprefix\n"
        "trap trap_on, or, 0x100\n"
        "trap trap_off, and, ~0x100\n"
        ".att_syntax\n");

TRACED long leaf(long value) {
    calls++;
    return value * 3 + 1;
}

// Optimised, it begins with a call.
TRACED long calls_at_once(long value) { return OPAQUE(leaf(value)) + 1; }

TRACED long descend(long depth) {
    if (depth == 0) return leaf(depth);
    return OPAQUE(descend(depth - 1)) + calls_at_once(depth);
}

void *body(void *unused) {
    (void)unused;
    long expected = descend(2);
    steps = 0;
    trap_on();
    long result = descend(2);
    trap_off();
    is_over = steps < first_look;
    EXPECT(result == expected);
    return 0;
}

int main(void) {
    // Brings the unwinder.
    void *frame;
    backtrace(&frame, 1);
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO};
    sigaction(SIGTRAP, &action, 0);
    long threads = 0;
    for (first_look = 0; !is_over; first_look += LOOKS) {
        pthread_t thread;
        EXPECT(pthread_create(&thread, 0, body, 0) == 0);
        EXPECT(pthread_join(thread, 0) == 0);
        threads++;
    }
    EXPECT(list_count > 5);
    for (int index = 0; index < list_count; index++) printf("%s\n", lists[index]);
    // Of the moment: the recorder adds instructions.
    tell_calls("leaf", calls);
    tell_calls("body", threads);
    return 0;
}
