package lab

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// kubernetesVersion is what the control plane says of itself; e2e/controlplane/go.mod requires the same.
const kubernetesVersion = "v1.36.3"

// tool is a program of one of the two modules.
type tool struct{ name, path string }

// tools is what Build builds from e2e/controlplane, the smallest first.
var tools = []tool{
	{"etcd", "go.etcd.io/etcd/server/v3"},
	{"kubectl", "k8s.io/kubernetes/cmd/kubectl"},
	{"helm", "helm.sh/helm/v3/cmd/helm"},
	{"kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"},
	{"kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"},
	{"kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"},
}

// neighbours is what Build builds from e2e/neighbours, after the control plane, with which they share most packages.
var neighbours = []tool{
	{"coredns", "./coredns"},
	{"ingress", "./ingress"},
	{"kube-network-policies", "sigs.k8s.io/kube-network-policies/cmd"},
}

// Built tells that a program is ready.
type Built struct {
	Program string // its file
	Took    time.Duration
	Cached  bool // it was there already, of the same versions
}

// Build builds the programs of the modules controlplane and neighbours, in folder e2e, into the user's cache folder,
// longshore/controlplane, one after another: linking one takes 1 GB of memory. What is there and of the same
// versions stays. ready is called after each program.
func Build(ctx context.Context, e2e string, ready func(Built)) error {
	folder, err := programFolder()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	return errors.Join(
		buildModule(ctx, filepath.Join(e2e, "controlplane"), tools, folder, ready),
		buildModule(ctx, filepath.Join(e2e, "neighbours"), neighbours, folder, ready),
	)
}

func buildModule(ctx context.Context, source string, tools []tool, folder string, ready func(Built)) error {
	stamp, err := versionStamp(source)
	if err != nil {
		return err
	}
	for _, t := range tools {
		began := time.Now()
		file := filepath.Join(folder, t.name)
		cached := t.isBuilt(file, stamp)
		if !cached {
			if err := t.build(ctx, source, file, stamp); err != nil {
				return fmt.Errorf("build %s: %w", t.name, err)
			}
		}
		ready(Built{Program: file, Took: time.Since(began), Cached: cached})
	}
	return nil
}

func programFolder() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("folder of the control plane's programs: %w", err)
	}
	return filepath.Join(cache, "longshore", "controlplane"), nil
}

// buildFlags are part of what the stamp tells apart.
var buildFlags = []string{
	"-trimpath",
	"-ldflags=-s -w" +
		" -X k8s.io/component-base/version.gitVersion=" + kubernetesVersion +
		" -X k8s.io/component-base/version.gitMajor=1" +
		" -X k8s.io/component-base/version.gitMinor=36",
}

// versionStamp is equal if, and only if, a build would give the same programs.
func versionStamp(source string) (string, error) {
	hash := sha256.New()
	err := filepath.WalkDir(source, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		hash.Write(b)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("module of the lab's programs: %w", err)
	}
	fmt.Fprintln(hash, runtime.Version(), runtime.GOARCH, buildFlags)
	return fmt.Sprintf("%x", hash.Sum(nil)), nil
}

func (t tool) isBuilt(file, stamp string) bool {
	b, err := os.ReadFile(file + ".stamp")
	if err != nil || string(b) != stamp {
		return false
	}
	_, err = os.Stat(file)
	return err == nil
}

// build leaves either the program and its stamp or what was there before.
func (t tool) build(ctx context.Context, source, file, stamp string) error {
	next := file + ".next"
	args := append([]string{"build", "-C", source, "-o", next}, buildFlags...)
	cmd := exec.CommandContext(ctx, "go", append(args, t.path)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w: %s", strings.Join(cmd.Args[1:], " "), err, out)
	}
	if err := os.Remove(file + ".stamp"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(next, file); err != nil {
		return err
	}
	return os.WriteFile(file+".stamp", []byte(stamp), 0o644)
}

// Program is the file of a program that [Build] has built: etcd, kubectl, helm, kube-proxy ...
func Program(name string) (string, error) { return program(name) }

// program finds a program that Build has built.
func program(name string) (string, error) {
	folder, err := programFolder()
	if err != nil {
		return "", err
	}
	file := filepath.Join(folder, name)
	if _, err := os.Stat(file); err != nil {
		return "", fmt.Errorf("%s is not built: run `go run ./e2e/build` in the repository first, as make does: %w", name, err)
	}
	return file, nil
}
