// 5,000 short threads one after the other: whatever a thread is given has to come back.
#include "check.h"
#include <pthread.h>

TRACED long work(long value) { return value + 1; }

static void *body(void *value) {
    long result = (long)value;
    for (int times = 0; times < 10; times++) result = work(result);
    return (void *)result;
}

int main(void) {
    void *value = 0;
    for (int thread = 0; thread < 5000; thread++) {
        pthread_t created;
        EXPECT(pthread_create(&created, 0, body, value) == 0);
        pthread_join(created, &value);
    }
    printf("value %ld\n", (long)value);
    tell_calls("work", 50000);
    return 0;
}
