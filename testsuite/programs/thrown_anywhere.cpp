// A handler that throws, at every single instruction of traced functions: each exception is caught by who called them, behind what it cleans up. The trap flag
// of the processor interrupts the thread after each instruction.
#include "check.h"
#include <csignal>
#include <ucontext.h>

static const int TRAP_FLAG = 0x100;
static volatile long steps, throws_at;
static volatile bool is_over;
static long cleaned;

static void on_trap(int, siginfo_t *, void *context) {
    greg_t &flags = static_cast<ucontext_t *>(context)->uc_mcontext.gregs[REG_EFL];
    if (is_over) {
        flags &= ~TRAP_FLAG;
        return;
    }
    long step = steps;
    steps = step + 1;
    if (step != throws_at) return;
    is_over = true;
    throw 7;
}

// They set and clear the flag. In assembly, so that an unwinder finds its way at each instruction.
extern "C" void trap_on();
extern "C" void trap_off();
__asm__(".macro trap name, operation, bits\n"
        "    .type \\name, @function\n"
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
    __asm__ volatile("");
    return value * 3 + 1;
}

TRACED long jumps(long value) { return leaf(value + 1); }

TRACED long middle(long value) { return leaf(value) + jumps(value + 1); }

// Has nothing to clean up, so that exceptions pass it from anywhere.
TRACED long run(long value) {
    trap_on();
    long result = middle(value);
    trap_off();
    return result;
}

struct Cleanup {
    ~Cleanup() { cleaned++; }
};

TRACED long body(long value) {
    try {
        Cleanup cleanup;
        return run(value);
    } catch (int thrown) {
        return -thrown;
    }
}

int main() {
    struct sigaction action = {};
    action.sa_sigaction = on_trap;
    // It is left by an exception, and has to come again.
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGTRAP, &action, nullptr);
    is_over = true;
    long expected = body(5), caught = 0;
    for (throws_at = 0;; throws_at = throws_at + 1) {
        steps = 0;
        is_over = false;
        long result = body(5);
        if (!is_over) {
            EXPECT(result == expected);
            break;
        }
        EXPECT(result == -7);
        caught++;
    }
    EXPECT(caught == throws_at && caught > 20);
    EXPECT(cleaned == caught + 2);
    printf("caught at each instruction\n");
    return 0;
}
