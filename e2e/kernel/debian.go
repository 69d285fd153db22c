package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// metaPackage depends on Debian's current stock kernel. The cloud flavour would be smaller but lacks 9p.
const metaPackage = "linux-image-amd64"

// image is an unpacked kernel: root/kernel and root/lib/modules/release.
type image struct {
	root    string
	release string
}

func (i image) kernel() string  { return filepath.Join(i.root, "kernel") }
func (i image) modules() string { return filepath.Join(i.root, "lib/modules") }

// cached finds the newest kernel in the cache. Its folder is named by its release and appears there complete (by a
// rename), so one that is there can be used, whoever put it there.
func cached(cache string) (image, bool) {
	found, err := filepath.Glob(filepath.Join(cache, "*", "kernel"))
	if err != nil || len(found) == 0 {
		return image{}, false
	}
	slices.Sort(found)
	root := filepath.Dir(found[len(found)-1])
	return image{root: root, release: filepath.Base(root)}, true
}

// fetch returns the cached kernel, after putting it there by apt if there is none.
func fetch(ctx context.Context, cache string, log *slog.Logger) (image, error) {
	if img, ok := cached(cache); ok {
		return img, nil
	}
	unlock, err := lock(ctx, filepath.Join(cache, "fetch.lock"), func() {
		log.Info("waiting for another process that fetches the kernel")
	})
	if err != nil {
		return image{}, err
	}
	defer unlock()
	if img, ok := cached(cache); ok {
		return img, nil
	}

	depends, err := run(ctx, cache, "apt-cache", "depends", metaPackage)
	if err != nil {
		return image{}, err
	}
	pkg, ok := dependency(depends)
	if !ok {
		return image{}, fmt.Errorf("apt knows no dependency of package %s: run apt-get update, on Debian", metaPackage)
	}
	log.Info("fetching the kernel, once", "package", pkg, "into", cache)
	work, err := os.MkdirTemp(cache, ".fetch-")
	if err != nil {
		return image{}, err
	}
	defer os.RemoveAll(work)
	if _, err := run(ctx, work, "apt-get", "download", pkg); err != nil {
		return image{}, fmt.Errorf("%w (apt-get update may help)", err)
	}
	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(debs) != 1 {
		return image{}, fmt.Errorf("apt-get download %s: left %d packages, want 1", pkg, len(debs))
	}
	return unpack(ctx, debs[0], work, cache)
}

// unpack makes an image in the cache from a Debian kernel package, using the scratch folder work on the same disk.
func unpack(ctx context.Context, deb, work, cache string) (image, error) {
	tree, root := filepath.Join(work, "tree"), filepath.Join(work, "root")
	if _, err := run(ctx, work, "dpkg-deb", "-x", deb, tree); err != nil {
		return image{}, err
	}
	var found []string
	for _, lib := range []string{"lib", "usr/lib"} { // the second since Debian 13
		releases, err := filepath.Glob(filepath.Join(tree, lib, "modules/*"))
		if err != nil {
			return image{}, err
		}
		found = append(found, releases...)
	}
	if len(found) != 1 {
		return image{}, fmt.Errorf("package %s: holds the modules of %d kernels, want 1", filepath.Base(deb), len(found))
	}
	img := image{root: filepath.Join(cache, filepath.Base(found[0])), release: filepath.Base(found[0])}
	if err := os.MkdirAll(filepath.Join(root, "lib/modules"), 0o755); err != nil {
		return image{}, err
	}
	if err := os.Rename(found[0], filepath.Join(root, "lib/modules", img.release)); err != nil {
		return image{}, err
	}
	if err := decompress(ctx, filepath.Join(tree, "boot/vmlinuz-"+img.release), filepath.Join(root, "kernel")); err != nil {
		return image{}, err
	}
	if _, err := os.Stat(filepath.Join(root, "lib/modules", img.release, "modules.dep")); err != nil {
		if _, err := run(ctx, work, "depmod", "-b", root, img.release); err != nil {
			return image{}, err
		}
	}
	return img, os.Rename(root, img.root)
}

// decompress writes the ELF kernel inside a bzImage (Documentation/x86/boot.rst, fields setup_sects, payload_offset and
// payload_length), which QEMU starts as well: a guest without KVM takes 3 seconds to do this at every boot. A kernel that
// is not compressed by xz is left as it is.
func decompress(ctx context.Context, bzImage, to string) error {
	content, err := os.ReadFile(bzImage)
	if err != nil {
		return err
	}
	payload, err := xzPayload(content)
	if err != nil {
		return fmt.Errorf("kernel %s: %w", filepath.Base(bzImage), err)
	}
	if payload == nil {
		return os.Rename(bzImage, to)
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer f.Close()
	var errs bytes.Buffer
	xz := exec.CommandContext(ctx, "xz", "-dc", "--single-stream")
	xz.Stdin, xz.Stdout, xz.Stderr = bytes.NewReader(payload), f, &errs
	if err := xz.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", xz, err, errs.Bytes())
	}
	return f.Close()
}

// xzPayload is the part of a bzImage that is the kernel compressed by xz, nil if that is compressed otherwise.
func xzPayload(bzImage []byte) ([]byte, error) {
	const setupSects, magic, payloadOffset, payloadLength = 0x1f1, 0x202, 0x248, 0x24c
	if len(bzImage) < payloadLength+4 || string(bzImage[magic:magic+4]) != "HdrS" {
		return nil, errors.New("not a bzImage")
	}
	field := func(at int) int { return int(binary.LittleEndian.Uint32(bzImage[at:])) }
	start := (int(bzImage[setupSects])+1)*512 + field(payloadOffset)
	end := start + field(payloadLength)
	if end > len(bzImage) {
		return nil, errors.New("bzImage cut short")
	}
	payload := bzImage[start:end]
	if !bytes.HasPrefix(payload, []byte("\xfd7zXZ\x00")) {
		return nil, nil
	}
	return payload, nil
}

// dependency picks the first dependency out of what apt-cache depends prints.
func dependency(output string) (pkg string, ok bool) {
	for line := range strings.Lines(output) {
		if pkg, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok {
			return pkg, true
		}
	}
	return "", false
}

// run runs a program in a folder and returns its standard output; an error carries what it said.
func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w", cmd, errors.Join(err, errors.New(strings.TrimSpace(errs.String()))))
	}
	return out.String(), nil
}

// tool is a program that the machine needs and the Debian package that has it.
type tool struct{ name, pkg string }

// missing says what this host lacks to run a machine, one line each, with the package to install. The tools that
// fetch a kernel count only if none is cached.
func missing(goarch string, lookPath func(string) (string, error), haveKernel bool) []string {
	var lacks []string
	if goarch != "amd64" {
		lacks = append(lacks, "this is "+goarch+": the virtual machine is amd64 only, elsewhere run on a kernel that has ip_vs")
	}
	tools := []tool{{"qemu-system-x86_64", "qemu-system-x86"}}
	if !haveKernel {
		tools = append(tools, tool{"apt-cache", "apt"}, tool{"apt-get", "apt"}, tool{"dpkg-deb", "dpkg"}, tool{"depmod", "kmod"}, tool{"xz", "xz-utils"})
	}
	for _, t := range tools {
		if _, err := lookPath(t.name); err != nil {
			lacks = append(lacks, t.name+" is not installed: Debian package "+t.pkg)
		}
	}
	return lacks
}
