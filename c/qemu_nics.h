/* SPDX-License-Identifier: BSD-2-Clause */
/* The NICs of a QEMU command line that are offered RSS.  Pure: it looks at words alone. */
#ifndef QS_QEMU_NICS_H
#define QS_QEMU_NICS_H

#include <stdbool.h>

#include "serve_client.h"

#define QS_NICS_MAX 256

struct qs_nic {
	int position;	     /* in argv, of what follows -device */
	char name[64];	     /* for people */
	const char *why_not; /* NULL, or why it can have no program */
	int queue_fd;	     /* the tap's first one, by its number */
	bool vhost;
	struct json_object *device;
	struct qs_program program; /* this one and the next are the caller's */
	char *given;		   /* the -device before it was changed, or NULL */
};

struct qs_nics {
	struct qs_nic nic[QS_NICS_MAX];
	int count;
};

/* Those after the QS_NICS_MAXth are left out.  The caller frees them. */
void qs_nics_read(int argc, char *const *argv, struct qs_nics *nics);
void qs_nics_free(struct qs_nics *nics);

/* A -device of qs_nics_read(), "{...}", with a program's fds; NULL without memory.  The caller frees it. */
char *qs_nic_with_fds(const char *device, const int fds[QS_PROGRAM_FDS]);

#endif
