# What there is to do with longshore. Everything builds into bin/; the lab's kernel and control plane are kept under
# the user's cache folder.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo development)
LINT    := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.11.4

export CGO_ENABLED = 0
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: build test demo bench lint generate clean packages lab

# build: bin/longshore, the one static program
build:
	@$(GO) build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$(VERSION)" -o bin/longshore ./cmd/longshore

# test: all tests, those that need IPVS in the lab's kernel (a virtual machine where this one has none)
test: lab
	@$(GO) run ./e2e/check

# demo: the lab with three nodes, a client and FRR; KEEP=1 stays up for exploring
demo: lab
	@$(GO) build -o bin/demo ./e2e/demo
	@KEEP=$(KEEP) bin/inlab -- bin/demo

# bench: longshore's Service proxy beside kube-proxy, into docs/benchmarks.md; about an hour. SIZES=1000,3000 and
# ONLY=coldstart,change choose, BENCH has further flags of e2e/bench: what is not the whole run goes to bin/benchmark only
bench: lab
	@$(GO) build -o bin/bench ./e2e/bench
	@bin/inlab -out bin/benchmark -- bin/bench -commit "$(VERSION)" \
		-machine "$$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" \
		$(if $(SIZES),-sizes $(SIZES)) $(if $(ONLY),-only $(ONLY)) $(BENCH)
	@$(if $(SIZES)$(ONLY)$(BENCH),,cp bin/benchmark/benchmarks.md docs/benchmarks.md)

# lab: what test, demo and bench need
lab: packages build
	@$(GO) build -o bin/inlab ./e2e/inlab
	@$(GO) run ./e2e/build

packages:
	@command -v $(GO) >/dev/null || { echo "Go 1.26 is needed: https://go.dev/dl" >&2; exit 1; }
	@sh e2e/packages.sh

# lint: golangci-lint with the import rules
lint: bin/golangci-lint
	@bin/golangci-lint run ./...

bin/golangci-lint: Makefile
	@GOBIN=$(CURDIR)/bin $(GO) install $(LINT)
	@touch $@

# generate: deepcopy methods and the chart's CustomResourceDefinitions, from the types in config/
generate:
	@$(GO) generate ./config

clean:
	@rm -rf bin
