/* SPDX-License-Identifier: BSD-2-Clause */
/* A byte with an fd, as QEMU's helpers and qsteer serve have it. */
#ifndef QS_SEND_FD_H
#define QS_SEND_FD_H

#include <string.h>
#include <sys/socket.h>

/* What sendmsg() gives: 1, or -1 and errno. */
static inline ssize_t qs_send_fd(int socket, int fd, int flags)
{
	char byte = 0;
	struct iovec text = { .iov_base = &byte, .iov_len = 1 };
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(fd))];
	} control = { 0 };
	struct msghdr message = {
		.msg_iov = &text,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control.bytes),
	};

	control.header.cmsg_level = SOL_SOCKET;
	control.header.cmsg_type = SCM_RIGHTS;
	control.header.cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
	return sendmsg(socket, &message, flags | MSG_NOSIGNAL);
}

#endif
