package lab

import (
	"context"
	"os"
	"path/filepath"
)

// secrets is the folder in which a container finds its service account (Kubernetes documentation, "Accessing the
// Kubernetes API from a Pod").
const secrets = "/run/secrets"

// InCluster runs a program of [Build], with the container's arguments and environment, as a program in a container finds
// itself: the pod's service account is in its place, and the API server is at its cluster IP, which works only if
// something serves that.
func (c *Cluster) InCluster(name string) ImageFunc {
	return func(ctx context.Context, pod *Pod) (Exec, error) {
		path, err := program(name)
		if err != nil {
			return Exec{}, err
		}
		account, err := c.plane.accountFolder(ctx, pod.Object.Namespace, pod.Object.Spec.ServiceAccountName)
		if err != nil {
			return Exec{}, err
		}
		const script = `mkdir -p "$1" && mount --bind "$0" "$1" && shift && exec "$@"`
		return Exec{
			Path: "unshare",
			Args: append([]string{"--mount", "sh", "-c", script, account, secrets, path}, pod.Args()...),
			Env:  append(pod.Env(), "KUBERNETES_SERVICE_HOST="+serviceRange4.Addr().Next().String(), "KUBERNETES_SERVICE_PORT=443"),
		}, nil
	}
}

// accountFolder writes what a container finds at secrets.
func (p *controlPlane) accountFolder(ctx context.Context, namespace, account string) (string, error) {
	token, err := p.token(ctx, namespace, account)
	if err != nil {
		return "", err
	}
	folder := p.file(filepath.Join("accounts", namespace, account))
	place := filepath.Join(folder, "kubernetes.io", "serviceaccount")
	if err := os.MkdirAll(place, 0o700); err != nil {
		return "", err
	}
	return folder, writeFiles(map[string][]byte{
		filepath.Join(place, "ca.crt"):    p.ca.pem,
		filepath.Join(place, "namespace"): []byte(namespace),
		filepath.Join(place, "token"):     []byte(token),
	})
}
