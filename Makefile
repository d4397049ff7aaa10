# Umbra's commands. `make` alone lists them.
#   NIC=e1000e|rtl8139|igb  SOUND=hda|es1370|ac97|none  DISK=none|nvme|ich9-ahci  CRASHES=3  UMBRA_CACHE=folder for what is fetched
#   UMBRA_BENCH_SPEED=0.25: the emulator runs as on a machine four times slower
#   on real hardware: PCI=0000:03:00.0 [IP=192.168.1.77/24, else DHCP] [PEER=address of this machine]
NIC     ?= e1000e
SOUND   ?= hda
DISK    ?= none
CRASHES ?= 3
PREFIX  ?= /usr
# Where debuggers look for what is stripped from programs in PREFIX/bin.
DEBUG    = /usr/lib/debug$(PREFIX)/bin
# Where Debian packages go.
DEBS    ?= target/deb
SECONDS ?= 60
TARGET  := target/x86_64-unknown-linux-gnu/release
BENCH   := $(TARGET)/umbra-bench
# All of tests/tests but `braked` and `package`, which run beside the others.
SCENARIOS = $(sort disk $(filter-out package,$(basename $(notdir $(wildcard tests/tests/*.rs)))))
# The other members' tests, by name: a run of one member alone would build its crates anew, with the features that it alone asks for.
QUICK     = $(filter-out common,$(basename $(notdir $(wildcard $(addsuffix /tests/*,driver-vm guest-images shadow splitter vmm)))))
CARGO   := $(shell command -v cargo || echo $(HOME)/.cargo/bin/cargo)

.PHONY: help sound build setup demo test test-disks bench shell lint toolchain browser packaging install place deb packages fuzz

help:
	@echo 'make demo     a download and a song survive the crashes of their drivers'
	@echo '              (NIC=$(NIC) SOUND=$(SOUND) DISK=$(DISK) CRASHES=$(CRASHES) [PCI=0000:03:00.0])'
	@echo 'make test     the whole test suite'
	@echo 'make bench    measurements: a table and target/bench/results.json'
	@echo 'make shell    a shell in the test host (NIC=$(NIC))'
	@echo 'make setup    fetch and build what the bench needs, no more'
	@echo 'make build    the programs, in $(TARGET)'
	@echo 'make install  programs, systemd unit, completions and man pages, below PREFIX ($(PREFIX)) in DESTDIR'
	@echo 'make deb      Debian packages, in $(DEBS)'
	@echo 'make fuzz     fuzz targets, SECONDS each ($(SECONDS)); TARGETS="rings messages"'
	@echo 'make lint     formatting and clippy'

toolchain:
	@.ci/toolchain

build: toolchain
	@echo '==> building Umbra (release, static); some minutes the first time'
	@$(CARGO) build --release --bins
	@$(MAKE) --no-print-directory sound

# The one program that is linked dynamically (driver-vm/sound/Cargo.toml says why): flags and folder of its own.
sound: toolchain
	@pkg-config --exists alsa || { echo '==> installing alsa-lib, with which the sound service is built'; \
	  .ci/apt-get install -y --no-install-recommends libasound2-dev pkg-config; }
	@cd driver-vm/sound && RUSTFLAGS='-C target-feature=-crt-static' $(CARGO) build --release
	@install -m 755 target/sound/$(notdir $(patsubst %/,%,$(dir $(TARGET))))/release/umbra-sound $(TARGET)/umbra-sound

browser:
	@.ci/browser

setup: build browser
	@echo '==> setting up the bench'
	@$(BENCH) setup

demo: build
	@$(BENCH) demo --nic $(NIC) --sound $(SOUND) --disk $(DISK) --crashes $(CRASHES) $(if $(PCI),--pci $(PCI)) \
		$(if $(IP),--guest $(IP)) $(if $(PEER),--peer $(PEER))

test: build browser
	@echo '==> setting up the bench'
	@$(BENCH) setup
	@echo '==> testing the sound service, which has a workspace of its own'
	@cd driver-vm/sound && RUSTFLAGS='-C target-feature=-crt-static' $(CARGO) test --release --quiet
	@echo '==> building all tests (release)'
	@$(CARGO) test --release --workspace --no-run
	@$(CARGO) test --release --workspace --no-run --test braked
	@echo '==> running them: the scenarios, and beside these what needs little of the machine'
	@$(BENCH) suite $(foreach scenario,$(SCENARIOS),--run '--workspace --test $(scenario)') \
	  --beside '--workspace --lib --bins $(foreach quick,$(QUICK),--test $(quick))' --beside '--workspace --doc' \
	  --beside '--workspace --test package' --beside '--workspace --test braked' \
	  -- $(CARGO) test --release --no-fail-fast -- --test-threads=1

# Scenarios that take longer than they may in `make test`.
test-disks: build
	@$(BENCH) setup
	@$(CARGO) test --release -p umbra-tests --test disk -- --ignored --nocapture --test-threads=1

bench: build
	@echo '==> measuring the splitter alone'
	@$(CARGO) bench --quiet -p umbra-splitter --bench splitter
	@$(BENCH) measure --nic $(NIC)

shell: build
	@$(BENCH) shell --nic $(NIC)

install: build
	@$(MAKE) --no-print-directory place

# Of the programs as they are; what `install` places is what packages hold.
packaging:
	@rm -rf target/packaging
	@$(TARGET)/umbra generate target/packaging
	@for unit in umbra@.service umbra-sleep.service; do \
	  sed 's|/usr/bin/umbra|$(PREFIX)/bin/umbra|g' packaging/$$unit > target/packaging/$$unit || exit 1; done

place: packaging
	@mkdir -p $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(DEBUG)
	@set -e; for program in umbra umbra-agent umbra-sound; do \
	  objcopy --only-keep-debug $(TARGET)/$$program $(DESTDIR)$(DEBUG)/$$program.debug; \
	  install -m 755 $(TARGET)/$$program $(DESTDIR)$(PREFIX)/bin; \
	  strip --strip-debug $(DESTDIR)$(PREFIX)/bin/$$program; \
	  objcopy --add-gnu-debuglink=$(DESTDIR)$(DEBUG)/$$program.debug $(DESTDIR)$(PREFIX)/bin/$$program; \
	done
	@install -D -m 644 -t $(DESTDIR)/usr/lib/systemd/system target/packaging/umbra@.service target/packaging/umbra-sleep.service
	@install -D -m 644 packaging/sleep.target.conf $(DESTDIR)/usr/lib/systemd/system/sleep.target.d/umbra.conf
	@install -D -m 755 packaging/umbra.kernel $(DESTDIR)/etc/kernel/postinst.d/zz-umbra
	@mkdir -p $(DESTDIR)/etc/umbra
	@install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/umbra packaging/umbra.rules.yml packaging/umbra-dashboard.json docs/examples/*.py
	@install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man1 target/packaging/man/*.1
	@install -D -m 644 target/packaging/completions/umbra.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/umbra
	@install -D -m 644 target/packaging/completions/_umbra $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_umbra
	@install -D -m 644 target/packaging/completions/umbra.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/umbra.fish

deb: build
	@$(MAKE) --no-print-directory packages

packages:
	@{ command -v dpkg-deb && command -v objdump; } >/dev/null || \
	  { echo 'packages are made with dpkg-deb and objdump: install the packages dpkg and binutils' >&2; exit 1; }
	@rm -rf $(DEBS)/tree
	@umask 022 && $(MAKE) --no-print-directory place PREFIX=/usr DESTDIR=$(DEBS)/tree
	@umask 022 && packaging/deb $(DEBS)/tree $(DEBS)
	@rm -rf $(DEBS)/tree $(DEBS)/tree.dbgsym

fuzz: toolchain
	@CARGO=$(CARGO) fuzz/run $(SECONDS) $(TARGETS)

lint: toolchain
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --release --workspace --all-targets --quiet -- -D warnings
	@$(CARGO) clippy --release --workspace --test braked --quiet -- -D warnings
