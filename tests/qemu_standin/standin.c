// SPDX-License-Identifier: BSD-2-Clause
/*
 * In QEMU's place: writes down what the kernel knows of this process, into the folder $QSQW_FOLDER.
 *
 * Asked for what it can do ("-qmp" is among its words) it gives the answer that is in $QSQW_ANSWER, and then does what
 * $QSQW_THEN says: "wait" until somebody ends it, "flood" with blanks, or end.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *part;

static int create(const char *name)
{
	char path[4096];
	int fd;

	snprintf(path, sizeof(path), "%s/%s-%s", getenv("QSQW_FOLDER"), part, name);
	fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (fd < 0)
		abort();
	return fd;
}

static void copy(int from, int to)
{
	static char bytes[65536];
	ssize_t got;

	while ((got = read(from, bytes, sizeof(bytes))) > 0)
		for (ssize_t at = 0, put; at < got; at += put)
			if ((put = write(to, bytes + at, got - at)) < 0)
				return;
}

static void keep(const char *name)
{
	char path[256];
	int from, to = create(name);

	snprintf(path, sizeof(path), "/proc/self/%s", name);
	from = open(path, O_RDONLY | O_CLOEXEC);
	copy(from, to);
	close(from);
	close(to);
}

static void keep_fds(void)
{
	DIR *listing = opendir("/proc/self/fd");
	struct dirent *entry;
	int to = create("fds");

	while ((entry = readdir(listing))) {
		char target[4096];
		ssize_t length =
			readlinkat(dirfd(listing), entry->d_name, target, sizeof(target) - 1);
		int fd = atoi(entry->d_name);

		if (length < 0 || fd == dirfd(listing) || fd == to)
			continue;
		target[length] = '\0';
		dprintf(to, "%d %s\n", fd, target);
	}
	closedir(listing);
	close(to);
}

static void keep_others(void)
{
	char *where = getcwd(NULL, 0);
	int to = create("others");

	dprintf(to, "cwd %s\n", where);
	dprintf(to, "children %s\n", waitpid(-1, NULL, WNOHANG) < 0 ? strerror(errno) : "some");
	close(to);
}

static void answer(void)
{
	static const char blanks[4096] = { [0 ... 4095] = ' ' };
	const char *then = getenv("QSQW_THEN");
	char asked[4096];
	int to = create("asked"), from = open(getenv("QSQW_ANSWER"), O_RDONLY | O_CLOEXEC);
	ssize_t length = read(STDIN_FILENO, asked, sizeof(asked));

	if (length < 0 || write(to, asked, length) != length)
		abort();
	copy(from, STDOUT_FILENO);
	while (!strcmp(then, "wait"))
		pause();
	while (!strcmp(then, "flood") && write(STDOUT_FILENO, blanks, sizeof(blanks)) > 0)
		;
}

int main(int argc, char **argv)
{
	int asked = 0;

	for (int i = 1; i < argc; i++)
		asked |= !strcmp(argv[i], "-qmp");
	part = asked ? "probe" : "vm";
	keep_fds();
	keep("cmdline");
	keep("environ");
	keep("status");
	keep("limits");
	keep_others();
	if (asked)
		answer();
	return asked ? 0 : 42;
}
