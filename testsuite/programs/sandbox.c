// Strict seccomp: nothing but read, write, exit and sigreturn. Traced functions are called as before, often and deep.
#include "check.h"
#include <string.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

TRACED long work(long value) { return value + 1; }
TRACED long deeper(long depth) { return depth == 0 ? 0 : OPAQUE(deeper(depth - 1)) + 1; }

static void say(const char *text) {
    if (write(1, text, strlen(text)) < 0) syscall(SYS_exit, 97);
}

int main(void) {
    long value = 0;
    for (int times = 0; times < 100; times++) value = work(value);
    tell_calls("work", 100 + 30000);
    tell_calls("deeper", 60001);
    EXPECT(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) == 0);
    for (int times = 0; times < 30000; times++) value = work(value);
    say(value == 30100 ? "worked\n" : "FAILED\n");
    say(deeper(60000) == 60000 ? "was deep\n" : "FAILED\n");
    syscall(SYS_exit, 14);
}
