/* A process that has something about it, and then sleeps, or executes the command that follows. */
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#endif

#ifdef LIKE_GO
/* Go's linker gives every program this section. */
__attribute__((section(".note.go.buildid"), used)) static const char build_id[] = "id";
#endif

/* Lets all system calls pass but one, which fails. */
static int forbid(int number)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof filter / sizeof *filter, filter };
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

int main(int count, char **words)
{
    const char *what = count > 1 ? words[1] : "";
    int result = 0;
    if (!strcmp(what, "forbid")) {
        result = forbid(atoi(words[2]));
        if (!result && count > 3) {
            execv(words[3], words + 3);
            result = 1;
        }
    } else if (!strcmp(what, "secret")) {
        result = prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    } else if (!strcmp(what, "no-new-code")) {
        result = prctl(PR_SET_MDWE, 1, 0, 0, 0);
    }
    puts(result ? "failed" : "ready");
    fflush(stdout);
    for (;;)
        pause();
}
