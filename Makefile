# SPDX-License-Identifier: BSD-2-Clause
# "make help" lists what there is.  Everything that is made is under build/, except what an editable install compiles.

# The system's own Python first: what is installed with it outlives a user's home directory.
PYTHON ?= $(or $(wildcard /usr/bin/python3),python3)
PREFIX ?= /usr/local
DESTDIR ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
KERNELS_ARGS ?=

# The Debian packages that building, the tests and the demo need.
PACKAGES := \
	clang llvm gcc libc6-dev linux-libc-dev libbpf-dev libelf-dev zlib1g-dev libjson-c-dev \
	python3-venv python3-dev \
	busybox-static cpio ethtool iproute2 kmod libcap2-bin xz-utils zstd

VENV := build/venv
INSTALLED := $(VENV)/.installed
COMPILED := $(VENV)/.compiled

# What QEMU or libvirt starts, in C: QEMU's helper= program, of nothing but libc, and libvirt's <emulator>.
PROGRAMS := qsteer-bridge-helper qsteer-qemu
BUILT := $(PROGRAMS:%=build/%)
qsteer-bridge-helper_SOURCES := c/bridge_helper.c c/bridge_acl.c c/bridge_args.c c/refusal.c
qsteer-qemu_SOURCES := c/qemu_wrapper.c c/qemu_find.c c/qemu_nics.c c/qemu_probe.c c/serve_client.c c/json.c c/refusal.c
# Into the program, where that can be: a domain must start whatever packages come and go.
qsteer-qemu_LIBRARIES = $(shell $(CC) -print-file-name=libjson-c.a | grep / || echo -ljson-c)
PROGRAM_FLAGS = -std=gnu11 -O2 -Wall -Wextra -Werror \
	-fPIE -pie -Wl,-z,relro,-z,now -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 -fstack-protector-strong \
	-DQS_VERSION='"$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' qsteer/__init__.py)"'
# A program, and the directory that it is made in.
compile_program = $(CC) $(PROGRAM_FLAGS) -o "$(2)/$(1)" $($(1)_SOURCES) $($(1)_LIBRARIES)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help bench demo fuzz test test-qemus test-kernels test-vhost lint build packages install uninstall clean

# Where "make install" puts things.  DESTDIR is in front of it only while a package is made, and is not to be found inside.
override PREFIX := $(patsubst %/,%,$(PREFIX))
ROOT_OF_INSTALL := $(DESTDIR)$(PREFIX)
LIBRARY := $(ROOT_OF_INSTALL)/lib/qsteer
COMMAND := $(ROOT_OF_INSTALL)/bin/qsteer
# What is called from a shell, or by QEMU: name, module and function, as in pyproject.toml.
COMMANDS := qsteer:qsteer.__main__:main qsteer-ifup:qsteer.ifup:main_up qsteer-ifdown:qsteer.ifup:main_down \
	qsteer-libvirt-hook:qsteer.libvirthook:main
# Where the system looks for what is in $(LIBRARY): link=target, both without blanks.
LINKS := \
	bin/qsteer=../lib/qsteer/bin/qsteer \
	bin/qsteer-ifup=../lib/qsteer/bin/qsteer-ifup \
	bin/qsteer-ifdown=../lib/qsteer/bin/qsteer-ifdown \
	bin/qsteer-qemu=../lib/qsteer/libexec/qsteer-qemu \
	libexec/qsteer-bridge-helper=../lib/qsteer/libexec/qsteer-bridge-helper \
	lib/systemd/system/qsteer-keep.service=../../qsteer/share/qsteer-keep.service \
	lib/systemd/system/qsteer-serve.service=../../qsteer/share/qsteer-serve.service \
	lib/systemd/system/qsteer-serve.socket=../../qsteer/share/qsteer-serve.socket \
	share/man/man8/qsteer.8=../../../lib/qsteer/share/qsteer.8

# Runs a command as root, with the environment of who called make; what it leaves in build/ belongs to them again.
define as_root
[[ $$(id -u) != 0 ]] || exec $(1)
command -v sudo >/dev/null || { echo "make $@: this needs root, and there is no sudo" >&2; exit 1; }
trap 'sudo chown -R "$$(id -u):$$(id -g)" build' EXIT
sudo -E env PYTHONDONTWRITEBYTECODE=1 $(1)
endef

help: ## list the targets
	awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	echo
	echo "Variables: PYTHON ($(PYTHON)), PREFIX ($(PREFIX)), DESTDIR; PYTEST_ARGS for test, BENCH_ARGS for bench,"
	echo "KERNELS_ARGS for test-kernels (tests rights guests vhost hashing, --kernel 6.1, --qemu 10.0, --save);"
	echo "QSTEER_STRICT=1 makes a skipped test a failed one; YES=1 lets the demo, the bench and the tests fetch what the"
	echo "distribution lacks without asking; QSTEER_ACCEL=kvm makes their guests faster where KVM works (tcg)."

demo: build ## boot a guest and check that every flow lands on the queue the guest asked for
	$(call as_root,$(VENV)/bin/python -m integration.demo)

bench: build ## measure what steering costs, against return 0, no program, and QEMU's own program (4 minutes)
	$(call as_root,$(VENV)/bin/python -m integration.bench $(BENCH_ARGS))

test: build ## run all tests (needs root, directly or through sudo)
	$(call as_root,$(VENV)/bin/python -m pytest -m "not compat and not patched and not decoy" $(PYTEST_ARGS))

test-qemus: build ## what depends on the QEMU, with QEMU 7.2, 10.0 and 11.1 (fetches what is missing)
	$(call as_root,$(VENV)/bin/python -m pytest -m compat $(PYTEST_ARGS))

test-kernels: build ## everything that depends on the kernel, on Linux 6.1, 6.12 and Debian unstable's (fetches them; an hour or two)
	$(call as_root,$(VENV)/bin/python -m integration.kernels $(KERNELS_ARGS))

test-vhost: build ## RSS with vhost=on, QEMU 10.0 and 11.1, in guests of a guest of Linux 6.12 (slow)
	$(call as_root,$(VENV)/bin/python -m integration.kernels vhost $(KERNELS_ARGS))

fuzz: build ## 500,000 hostile inputs for the C programs (under ASan), the service and the QMP client (4 minutes)
	$(call as_root,$(SHELL) -ec 'for what in "bridge_helper --fuzz" qemu_fuzz serve_fuzz "plugged --fuzz"; do \
		$(VENV)/bin/python -m integration.$$what; done')

lint: build ## run the formatters and type checkers only
	$(VENV)/bin/python -m pytest tests/unit/test_linters.py $(PYTEST_ARGS)

build: packages $(COMPILED) $(BUILT) ## an editable install in build/venv, and the programs that QEMU and libvirt start

packages: ## install the Debian packages that are missing
	command -v dpkg-query >/dev/null && command -v apt-get >/dev/null || exit 0
	missing=()
	for package in $(PACKAGES); do
		[[ $$(dpkg-query -W -f '$${db:Status-Status}' "$$package" 2>/dev/null) == installed* ]] || missing+=("$$package")
	done
	[[ $${#missing[@]} != 0 ]] || exit 0
	sudo=()
	if [[ $$(id -u) != 0 ]]; then
		command -v sudo >/dev/null || {
			echo "make: Debian packages are missing; as root: apt-get install $${missing[*]}" >&2
			exit 1
		}
		sudo=(sudo)
	fi
	echo "Installing Debian packages: $${missing[*]}"
	"$${sudo[@]}" apt-get update -qq
	"$${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq -y --no-install-recommends --no-remove "$${missing[@]}"

define check_python
"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
	echo "make $@: $(PYTHON) is not Python 3.11 or later; name one that is: PYTHON=..." >&2
	exit 1
}
"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || {
	echo "make $@: $(PYTHON) cannot make virtual environments (Debian package python3-venv)" >&2
	exit 1
}
endef

$(INSTALLED): pyproject.toml setup.py qsteer/__init__.py | packages
	$(check_python)
	echo "Setting up $(VENV)"
	"$(PYTHON)" -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

# Without pip when only C changed.
$(COMPILED): $(INSTALLED) qsteer/shim_build.py $(shell find c -type f)
	$(VENV)/bin/python setup.py --quiet build_ext --inplace
	touch $@

$(BUILT): build/%: $(wildcard c/*.c c/*.h) qsteer/__init__.py Makefile | packages
	mkdir -p build
	$(call compile_program,$*,build)

# Both stop before anything changes when what they would replace or remove is not from here.
define check_install
[[ "$(PREFIX)" =~ ^/[A-Za-z0-9/._+-]+$$ ]] || {
	echo "make $@: PREFIX is an absolute path of letters, digits and /._+-, not \"$(PREFIX)\"" >&2
	exit 1
}
if [[ -e "$(LIBRARY)" && ! -e "$(LIBRARY)/.from-make-install" ]]; then
	echo "make $@: $(LIBRARY) is not from make install, and stays" >&2
	exit 1
fi
for link in $(LINKS); do
	path="$(ROOT_OF_INSTALL)/$${link%=*}"
	if [[ ( -e "$$path" || -L "$$path" ) && "$$(readlink "$$path")" != "$${link#*=}" ]]; then
		echo "make $@: $$path is not from make install, and stays" >&2
		exit 1
	fi
done
endef

define check_right
[[ -w "$(ROOT_OF_INSTALL)/lib" && -w "$(ROOT_OF_INSTALL)/bin" ]] || {
	echo "make $@: no right to write to $(ROOT_OF_INSTALL); as root: make $@" >&2
	exit 1
}
endef

# Everything is made in a temporary directory: the checkout may be another user's, and a build that fails changes nothing.
install: ## put qsteer under PREFIX, with a virtual environment of its own
	$(check_install)
	$(check_python)
	umask 022
	mkdir -p "$(ROOT_OF_INSTALL)/lib" "$(ROOT_OF_INSTALL)/bin" 2>/dev/null || true
	$(check_right)
	work=$$(mktemp -d)
	trap 'rm -rf "$$work"' EXIT
	mkdir "$$work/source"
	cp -R c qsteer pyproject.toml setup.py MANIFEST.in README.md LICENSE CHANGELOG.md "$$work/source"
	rm -rf "$$work"/source/qsteer/{bpf,_shim*.so,__pycache__}
	echo "Building qsteer"
	"$(PYTHON)" -m venv "$$work/tools"
	"$(PYTHON)" -m venv --without-pip "$$work/qsteer"
	"$$work/tools/bin/python" -m pip --python "$$work/qsteer/bin/python" install --quiet --no-compile "$$work/source" \
		2>"$$work/log" || {
		grep -o 'qsteer cannot be built .*' "$$work/log" >&2 || cat "$$work/log" >&2
		exit 1
	}
	mkdir "$$work/qsteer/libexec"
	$(foreach program,$(PROGRAMS),$(call compile_program,$(program),$$work/qsteer/libexec);)
	(
		cd "$$work/qsteer"
		find bin -mindepth 1 ! -name 'python*' -delete
		for command in $(COMMANDS); do
			IFS=: read -r name module main <<<"$$command"
			printf '%s\n' '#!$(PREFIX)/lib/qsteer/bin/python -I' 'import sys' '' "from $$module import $$main" '' \
				"sys.exit($$main())" >"bin/$$name"
			chmod 755 "bin/$$name"
		done
		sed -i '/^command = /d' pyvenv.cfg
		rm -f lib/python3.*/site-packages/qsteer-*.dist-info/direct_url.json
		bin/python -m compileall -q -p "$(PREFIX)/lib/qsteer" lib
		mkdir share
		for unit in qsteer-keep.service qsteer-serve.service qsteer-serve.socket; do
			sed 's|@PREFIX@|$(PREFIX)|g' "$(CURDIR)/systemd/$$unit.in" >"share/$$unit"
		done
		cat "$(CURDIR)/docs/qsteer.8" >share/qsteer.8
		cat "$(CURDIR)/docs/qsteer.toml" >share/qsteer.toml
		cat "$(CURDIR)/docs/qsteer-domain.rng" >share/qsteer-domain.rng
		touch .from-make-install
	)
	rm -rf "$(LIBRARY).new"
	cp -R "$$work/qsteer" "$(LIBRARY).new"
	rm -rf "$(LIBRARY).old"
	[[ ! -e "$(LIBRARY)" ]] || mv "$(LIBRARY)" "$(LIBRARY).old"
	mv "$(LIBRARY).new" "$(LIBRARY)"
	rm -rf "$(LIBRARY).old"
	for link in $(LINKS); do
		mkdir -p "$$(dirname "$(ROOT_OF_INSTALL)/$${link%=*}")"
		ln -sfn "$${link#*=}" "$(ROOT_OF_INSTALL)/$${link%=*}"
	done
	echo "Installed $(COMMAND), its manual page qsteer(8), and the units qsteer-keep.service and qsteer-serve.socket, which are not enabled"
	echo "qsteer-bridge-helper has no privileges yet; to let QEMU's users have taps on the bridges of /etc/qemu/bridge.conf:"
	echo "  setcap cap_net_admin+ep $(PREFIX)/lib/qsteer/libexec/qsteer-bridge-helper"

uninstall: ## take off what install put there; running virtual machines stay steered
	$(check_install)
	[[ -e "$(LIBRARY)" || -L "$(COMMAND)" ]] || { echo "qsteer is not installed under $(ROOT_OF_INSTALL)"; exit 0; }
	$(check_right)
	rm -rf "$(LIBRARY)"
	for link in $(LINKS); do
		rm -f "$(ROOT_OF_INSTALL)/$${link%=*}"
	done
	for directory in libexec lib/systemd/system lib/systemd share/man/man8 share/man; do
		rmdir --ignore-fail-on-non-empty "$(ROOT_OF_INSTALL)/$$directory" 2>/dev/null || true
	done
	echo "Removed $(COMMAND) and $(LIBRARY)."
	echo "Services that run have to be stopped: systemctl disable --now qsteer-keep qsteer-serve.socket qsteer-serve"
	echo "Running virtual machines stay steered: /sys/fs/bpf/qsteer and /run/qsteer are as they were."
	[[ ! -e /etc/libvirt/hooks/qemu.d/50-qsteer ]] ||
		echo "libvirt's hook, which does nothing now, is still there: rm /etc/libvirt/hooks/qemu.d/50-qsteer"
	echo "Domains of libvirt whose <emulator> is qsteer-qemu do not start any more: virsh edit."

clean: ## remove everything that is made, build/ included
	rm -rf build dist qsteer.egg-info qsteer/bpf qsteer/_shim*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
