// SPDX-License-Identifier: BSD-2-Clause
#include "qemu_find.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

/* Where an administrator says which QEMU it is. */
#ifndef QS_CHOICES
#define QS_CHOICES "/etc/qsteer/qemu"
#endif
#ifndef QS_PLACES
#define QS_PLACES "/usr/bin", "/usr/local/bin", "/usr/libexec"
#endif

static const char *const places[] = { QS_PLACES };

/* QEMU's name of a machine that Linux calls otherwise. */
static const char *qs_target(const char *machine)
{
	if (machine[0] == 'i' && !strcmp(machine + 2, "86"))
		return "i386";
	if (!strncmp(machine, "armv", 4))
		return "arm";
	if (!strcmp(machine, "ppc64le"))
		return "ppc64";
	if (!strncmp(machine, "parisc", 6))
		return "hppa";
	return machine;
}

static void qs_name(const char *called, char name[NAME_MAX])
{
	const char *slash = strrchr(called, '/'), *base = slash ? slash + 1 : called;
	struct utsname host;

	if (!strncmp(base, "qsteer-", 7))
		base += 7;
	if (strcmp(base, "qemu") || uname(&host))
		snprintf(name, NAME_MAX, "%s", base);
	else
		snprintf(name, NAME_MAX, "qemu-system-%s", qs_target(host.machine));
}

/* Why a program cannot be run instead of this one; NULL if it can. */
static const char *qs_unfit(const char *path, const struct stat *self)
{
	struct stat file;

	if (stat(path, &file))
		return strerror(errno);
	if (file.st_dev == self->st_dev && file.st_ino == self->st_ino)
		return "it is qsteer-qemu itself";
	if (!S_ISREG(file.st_mode))
		return "it is no program";
	return access(path, X_OK) ? strerror(errno) : NULL;
}

static bool qs_only_roots(const struct stat *file)
{
	return file->st_uid == 0 &&
	       (S_ISLNK(file->st_mode) || !(file->st_mode & (S_IWGRP | S_IWOTH)));
}

/* Its own path, so that a script or QEMU finds what is beside it. */
static int qs_chosen(const char *name, const struct stat *self, char path[PATH_MAX],
		     struct qs_refusal *remark)
{
	char link[sizeof(QS_CHOICES) + 1 + NAME_MAX];
	struct stat directory, entry;
	const char *why;

	snprintf(link, sizeof(link), "%s/%s", QS_CHOICES, name);
	if (stat(QS_CHOICES, &directory) || lstat(link, &entry)) {
		if (errno == ENOENT || errno == ENOTDIR)
			return -1;
		why = strerror(errno);
	} else if (!qs_only_roots(&directory) || !qs_only_roots(&entry)) {
		why = "others than root may change it";
	} else {
		why = qs_unfit(link, self);
		if (!why && realpath(link, path))
			return 0;
		why = why ? why : strerror(errno);
	}
	return qs_refuse(remark, "%s is passed over: %s", link, why);
}

int qs_qemu_find(const char *called, char path[PATH_MAX], struct qs_refusal *remark,
		 struct qs_refusal *refusal)
{
	char name[NAME_MAX];
	struct stat self = { 0 };

	*remark->why = '\0';
	stat("/proc/self/exe", &self); /* without /proc nothing is this program */
	qs_name(called, name);
	if (!*name || !strcmp(name, ".") || !strcmp(name, ".."))
		return qs_refuse(refusal, "it has to be called by a name: qsteer-qemu");
	if (!qs_chosen(name, &self, path, remark))
		return 0;
	for (size_t i = 0; i < sizeof(places) / sizeof(*places); i++) {
		snprintf(path, PATH_MAX, "%s/%s", places[i], name);
		if (!qs_unfit(path, &self))
			return 0;
	}
	return qs_refuse(refusal, "there is no %s to run in %s, %s or another usual place", name,
			 QS_CHOICES, places[0]);
}
