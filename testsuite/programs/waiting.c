// Calls a function, says so in a file, and waits until a file `over` is there.
#include <unistd.h>

#include "check.h"

__attribute__((noinline)) unsigned work(unsigned x) {
    __asm__ volatile("" : "+r"(x));
    return x + 1;
}

int main(void) {
    unsigned x = 0;
    for (int i = 0; i < 1000; i++)
        x = work(x);
    FILE *ready = fopen("ready", "w");
    EXPECT(x == 1000 && ready != NULL && fclose(ready) == 0);
    while (access("over", F_OK) != 0)
        usleep(1000);
    return 0;
}
