// Says that it ran, for checks of programs that must not, or must to their end. With an argument, it makes many calls first.
#include <stdio.h>

__attribute__((noinline)) unsigned work(unsigned x) {
    __asm__ volatile("" : "+r"(x));
    return x * 31 + 1;
}

int main(int argc, char **argv) {
    unsigned x = (unsigned)(unsigned long)argv[0] & 0;
    for (int i = 0; argc > 1 && i < 3000000; i++)
        x = work(x);
    printf("ran to its end %u\n", x);
    return 6;
}
