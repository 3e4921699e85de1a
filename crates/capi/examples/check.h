/* What the examples do when something went wrong: say why, and end. */

#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <trapline.h>

static inline void check(trapline_status status) {
    if (status != TRAPLINE_STATUS_OK) {
        fprintf(stderr, "status %d: %s\n", status, trapline_message());
        exit(EXIT_FAILURE);
    }
}

#endif
