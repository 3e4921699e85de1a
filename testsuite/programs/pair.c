// Threads that call two functions one after the other, which have to be of the same version. Each line of input is answered by a line: how many calls there were,
// how many pairs were mixed, which version is there now, and what the static variable counts.

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

#include "check.h"

#ifndef VERSION
#define VERSION 1
#endif

// What the function that never returns adds.
#ifndef LOOP
#define LOOP 1
#endif

#define THREADS 4

static atomic_ulong calls, mixed;
static __thread unsigned long own_calls;
static unsigned long counted;

__attribute__((noipa)) int first(int x)
{
	own_calls++;
	return x * 2 + VERSION;
}

__attribute__((noipa)) int second(int x)
{
	__atomic_fetch_add(&counted, 1, __ATOMIC_RELAXED);
	return x * 3 + VERSION + (own_calls == 0);
}

__attribute__((noipa)) int pair(int x)
{
	int one = first(x);

	// Between the two, so that a transition finds somebody here.
	for (volatile int i = 0; i < 100; i++)
		;
	return one - x * 2 == second(x) - x * 3;
}

__attribute__((noipa)) void for_ever(void)
{
	for (;;) {
		own_calls += LOOP;
		pause();
	}
}

static void *check(void *unused)
{
	for (int x = 0;; x = (x + 1) & 0xffff) {
		if (!pair(x))
			atomic_fetch_add(&mixed, 1);
		atomic_fetch_add(&calls, 1);
		// Elsewhere, most of the time.
		for (volatile int i = 0; i < 2000; i++)
			;
	}
	return unused;
}

static void *sleeper(void *unused)
{
	for_ever();
	return unused;
}

int main(void)
{
	pthread_t thread;

	// Whatever becomes of the check, this ends.
	alarm(300);
	for (int i = 0; i < THREADS; i++)
		pthread_create(&thread, NULL, check, NULL);
	pthread_create(&thread, NULL, sleeper, NULL);
	puts("ready");
	fflush(stdout);
	for (int c; (c = getchar()) != EOF;) {
		if (c != '\n')
			continue;
		unsigned long before = atomic_load(&calls);

		while (atomic_load(&calls) < before + 1000)
			sched_yield();
		printf("%lu %lu %d %d\n", atomic_load(&calls), atomic_load(&mixed), first(0),
		       __atomic_load_n(&counted, __ATOMIC_RELAXED) >= before);
		fflush(stdout);
	}
	return 0;
}
