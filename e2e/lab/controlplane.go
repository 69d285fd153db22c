package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// The ranges of cluster IPs; a dual-stack Service gets one of each.
var (
	serviceRange4 = netip.MustParsePrefix("10.96.0.0/16")
	serviceRange6 = netip.MustParsePrefix("fd96::/112")
)

// apiPort is where kube-apiserver serves HTTPS.
const apiPort = 6443

// controllers is what kube-controller-manager runs: what makes Services, their endpoints, pods, and the accounts
// of programs work. The rest (volumes, autoscaling, certificates, ...) would only cost start-up time.
var controllers = []string{
	"serviceaccount-controller", "serviceaccount-token-controller", "root-ca-certificate-publisher-controller",
	"endpoints-controller", "endpointslice-controller", "endpointslice-mirroring-controller",
	"node-lifecycle-controller", "taint-eviction-controller", "pod-garbage-collector-controller",
	"deployment-controller", "replicaset-controller", "daemonset-controller", "statefulset-controller", "job-controller",
	"namespace-controller", "garbage-collector-controller", "clusterrole-aggregation-controller", "disruption-controller",
	"service-cidr-controller",
}

// controlPlane is etcd, kube-apiserver and kube-controller-manager in the host api.
type controlPlane struct {
	host      *Host
	folder    string // keys, kubeconfigs, the database
	ca        *authority
	admin     *rest.Config
	client    kubernetes.Interface
	processes []*Process
}

// startControlPlane starts the programs and returns when the API server is ready and the default account exists.
func (l *Lab) startControlPlane(ctx context.Context) (*controlPlane, error) {
	p, err := l.startAPI(ctx)
	if err != nil {
		return nil, err
	}
	// Only now: kube-controller-manager gives up when it sees no API server for 10 s.
	if err := p.start(p.controllerManager()); err != nil {
		return nil, err
	}
	return p, p.await(ctx, "service account default/default", p.defaultAccount)
}

// startAPI starts etcd and kube-apiserver and returns when the latter is ready.
func (l *Lab) startAPI(ctx context.Context) (*controlPlane, error) {
	p := &controlPlane{host: l.API, folder: l.state}
	if err := p.makeKeys(); err != nil {
		return nil, fmt.Errorf("keys of the control plane: %w", err)
	}
	if err := errors.Join(p.start(p.etcd()), p.start(p.apiserver())); err != nil {
		return nil, err
	}
	return p, p.await(ctx, "API server ready", p.ready)
}

func (p *controlPlane) start(e Exec) error {
	path, err := program(e.Name)
	if err != nil {
		return err
	}
	e.Path = path
	process, err := p.host.Start(e)
	if err != nil {
		return err
	}
	p.processes = append(p.processes, process)
	return nil
}

func (p *controlPlane) file(name string) string { return filepath.Join(p.folder, name) }

// makeKeys writes every key, certificate and kubeconfig, and makes the administrator's client.
func (p *controlPlane) makeKeys() (err error) {
	if p.ca, err = newAuthority(); err != nil {
		return err
	}
	names := []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"}
	server, err := p.ca.server(names, p.host.V4, p.host.V6, serviceRange4.Addr().Next(), serviceRange6.Addr().Next(),
		netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback())
	if err != nil {
		return err
	}
	private, public, err := signingKey()
	if err != nil {
		return err
	}
	if err := writeFiles(map[string][]byte{
		p.file("ca.crt"):        p.ca.pem,
		p.file("apiserver.crt"): server.cert,
		p.file("apiserver.key"): server.key,
		p.file("sa.key"):        private,
		p.file("sa.pub"):        public,
	}); err != nil {
		return err
	}
	if _, err := p.kubeconfigFor("system:kube-controller-manager"); err != nil {
		return err
	}
	return p.makeAdmin()
}

func (p *controlPlane) makeAdmin() error {
	file, err := p.kubeconfigFor("admin", "system:masters")
	if err != nil {
		return err
	}
	if p.admin, err = clientcmd.BuildConfigFromFlags("", file); err != nil {
		return err
	}
	p.admin.Dial = p.host.DialContext // this process is in no namespace of the lab
	p.admin.QPS = -1                  // no limit
	p.client, err = kubernetes.NewForConfig(p.admin)
	return err
}

func (p *controlPlane) url() string {
	return fmt.Sprintf("https://%s", netip.AddrPortFrom(p.host.V4, apiPort))
}

// kubeconfigFor writes the kubeconfig of a user with a client certificate.
func (p *controlPlane) kubeconfigFor(user string, groups ...string) (string, error) {
	id, err := p.ca.client(user, groups...)
	if err != nil {
		return "", err
	}
	return p.writeKubeconfig(user, &api.AuthInfo{ClientCertificateData: id.cert, ClientKeyData: id.key})
}

func (p *controlPlane) writeKubeconfig(name string, auth *api.AuthInfo) (string, error) {
	c := api.NewConfig()
	c.Clusters["lab"] = &api.Cluster{Server: p.url(), CertificateAuthorityData: p.ca.pem}
	c.AuthInfos[name] = auth
	c.Contexts["lab"] = &api.Context{Cluster: "lab", AuthInfo: name}
	c.CurrentContext = "lab"
	file := p.file(strings.ReplaceAll(fileName(name), ":", "-") + ".kubeconfig")
	if err := clientcmd.WriteToFile(*c, file); err != nil {
		return "", fmt.Errorf("write the kubeconfig of %s: %w", name, err)
	}
	return file, nil
}

func (p *controlPlane) etcd() Exec {
	const clients, peers = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	return Exec{Name: "etcd", Args: []string{
		"--name=lab", "--data-dir=" + p.file("etcd"),
		"--listen-client-urls=" + clients, "--advertise-client-urls=" + clients,
		"--listen-peer-urls=" + peers, "--initial-advertise-peer-urls=" + peers, "--initial-cluster=lab=" + peers,
		"--unsafe-no-fsync", // the data dies with the lab
		"--log-level=warn",
	}}
}

func (p *controlPlane) apiserver() Exec {
	return Exec{Name: "kube-apiserver", Args: []string{
		"--etcd-servers=http://127.0.0.1:2379",
		"--advertise-address=" + p.host.V4.String(), "--bind-address=::", fmt.Sprintf("--secure-port=%d", apiPort),
		"--tls-cert-file=" + p.file("apiserver.crt"), "--tls-private-key-file=" + p.file("apiserver.key"),
		"--client-ca-file=" + p.file("ca.crt"), "--authorization-mode=Node,RBAC",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-signing-key-file=" + p.file("sa.key"), "--service-account-key-file=" + p.file("sa.pub"),
		fmt.Sprintf("--service-cluster-ip-range=%s,%s", serviceRange4, serviceRange6),
		"--allow-privileged", // agents use the host's network and capabilities
	}}
}

func (p *controlPlane) controllerManager() Exec {
	return Exec{Name: "kube-controller-manager", Args: []string{
		"--kubeconfig=" + p.file("system-kube-controller-manager.kubeconfig"),
		"--controllers=" + strings.Join(controllers, ","), "--use-service-account-credentials",
		"--service-account-private-key-file=" + p.file("sa.key"), "--root-ca-file=" + p.file("ca.crt"),
		"--leader-elect=false", "--bind-address=127.0.0.1",
		// A node that says nothing for 8 s is dead; a real cluster waits 50 s.
		"--node-monitor-period=1s", "--node-monitor-grace-period=8s", "--node-startup-grace-period=20s",
	}}
}

// await is Await that also ends when a program of the control plane has.
func (p *controlPlane) await(ctx context.Context, what string, check func(context.Context) error) error {
	return awaitUnless(ctx, what, 3*time.Minute, p.died, check)
}

func (p *controlPlane) ready(ctx context.Context) error {
	b, err := p.client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
	if err != nil {
		return fmt.Errorf("%w: %s", err, b)
	}
	return nil
}

// defaultAccount checks that kube-controller-manager has made the account that pods run under.
func (p *controlPlane) defaultAccount(ctx context.Context) error {
	_, err := p.client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
	return err
}

// died is why a program of the control plane has ended by itself, or nil.
func (p *controlPlane) died() error {
	var errs []error
	for _, process := range p.processes {
		errs = append(errs, process.Err())
	}
	return errors.Join(errs...)
}

// tokenKubeconfig writes a kubeconfig with a token of a service account.
func (p *controlPlane) tokenKubeconfig(ctx context.Context, namespace, account string) (string, error) {
	token, err := p.token(ctx, namespace, account)
	if err != nil {
		return "", err
	}
	return p.writeKubeconfig(namespace+"-"+account, &api.AuthInfo{Token: token})
}

// token is one of a service account (TokenRequest), good for a day.
func (p *controlPlane) token(ctx context.Context, namespace, account string) (string, error) {
	seconds := int64(24 * 60 * 60)
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds}}
	answer, err := p.client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, account, request, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("token for service account %s/%s: %w", namespace, account, err)
	}
	return answer.Status.Token, nil
}
