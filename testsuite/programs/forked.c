// Each line of input is answered by one: the last child, what version the child has, which version is there, and 1. The letter f in a line makes another child, which lives
// until the program ends.

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "check.h"

#ifndef VERSION
#define VERSION 1
#endif

__attribute__((noipa)) int version(int x)
{
	// Longer than a jump.
	return OPAQUE(x * 1000) / 1000 + VERSION;
}

static int to_child[2], from_child[2];

static pid_t child(void)
{
	char byte;
	pid_t made;

	if (pipe(to_child) != 0 || pipe(from_child) != 0)
		_exit(1);
	made = fork();
	if (made != 0)
		return made;
	// It ends with its parent.
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	close(to_child[1]);
	while (read(to_child[0], &byte, 1) == 1) {
		byte = version(0);
		if (write(from_child[1], &byte, 1) != 1)
			break;
	}
	_exit(0);
}

int main(void)
{
	char line[64];
	pid_t last = 0;

	// Whatever becomes of the check, this ends.
	alarm(300);
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		char its = 0;

		if (strchr(line, 'f'))
			last = child();
		if (last != 0 && (write(to_child[1], "?", 1) != 1 || read(from_child[0], &its, 1) != 1))
			return 1;
		printf("%d %d %d 1\n", last, its, version(0));
		fflush(stdout);
	}
	return 0;
}
