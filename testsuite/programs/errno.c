// errno and the floating-point environment are as the program left them, across calls enough to fill several chunks and in new threads.
#include "check.h"
#include <errno.h>
#include <fenv.h>
#include <pthread.h>
#include <xmmintrin.h>

TRACED long deeper(long depth) { return depth == 0 ? 0 : OPAQUE(deeper(depth - 1)) + 1; }
TRACED long work(long value) { return value + 1; }

static void *body(void *start) {
    errno = (int)(long)start;
    fesetround(FE_UPWARD);
    unsigned control = _mm_getcsr();
    long value = 0;
    for (int times = 0; times < 20000; times++) value = work(value);
    EXPECT(errno == (int)(long)start);
    EXPECT(deeper(20000) == 20000);
    EXPECT(errno == (int)(long)start);
    EXPECT(fegetround() == FE_UPWARD && _mm_getcsr() == control);
    return 0;
}

int main(void) {
    for (long number = 1; number < 8; number++) {
        pthread_t thread;
        pthread_create(&thread, 0, body, (void *)number);
        pthread_join(thread, 0);
    }
    body((void *)200);
    printf("kept\n");
    tell_calls("work", 8 * 20000);
    tell_calls("deeper", 8 * 20001);
    return 0;
}
