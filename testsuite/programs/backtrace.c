// backtrace() from traced functions: as many frames, with the same names, at every depth and from a signal handler.
#include "check.h"
#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <string.h>

static void show(const char *what) {
    void *frames[200];
    int count = backtrace(frames, 200);
    printf("%s: %d frames", what, count);
    for (int frame = 0; frame < count; frame++) {
        Dl_info info;
        const char *name = dladdr((char *)frames[frame] - 1, &info) && info.dli_sname ? info.dli_sname : "?";
        printf(" %s", name);
    }
    printf("\n");
}

static long calls;
TRACED long descend(long depth) {
    calls++;
    if (depth == 0) {
        show("bottom");
        return 1;
    }
    return OPAQUE(descend(depth - 1)) + 1;
}

TRACED void handler(int signal) {
    (void)signal;
    show("handler");
}

TRACED void raiser(void) {
    raise(SIGUSR1);
    __asm__("");
}

int main(void) {
    signal(SIGUSR1, handler);
    for (long depth = 0; depth < 60; depth += 7) descend(depth);
    raiser();
    tell_calls("descend", calls);
    tell_calls("handler", 1);
    tell_calls("raiser", 1);
    return 0;
}
