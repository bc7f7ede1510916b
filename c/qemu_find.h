/* SPDX-License-Identifier: BSD-2-Clause */
/* The QEMU in whose place this program is called. */
#ifndef QS_QEMU_FIND_H
#define QS_QEMU_FIND_H

#include <limits.h>

#include "refusal.h"

/*
 * The path of the QEMU for argv[0], "qsteer-NAME"; never this very program.  0, or -1 and why not.  Remark is why an
 * administrator's own choice was passed over, or empty.
 */
int qs_qemu_find(const char *called, char path[PATH_MAX], struct qs_refusal *remark,
		 struct qs_refusal *refusal);

#endif
