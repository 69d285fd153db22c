{{/* Labels of every object; the argument is a dict of root and component. */}}
{{- define "longshore.labels" -}}
{{ include "longshore.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | quote }}
{{- end }}

{{/* Labels that select the pods of a component. */}}
{{- define "longshore.selector" -}}
app.kubernetes.io/name: longshore
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "longshore.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* Environment of both components: our namespace, and the API server if it is not to be found by its cluster IP. */}}
{{- define "longshore.env" -}}
- name: NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
{{- with .Values.apiServer.host }}
- name: KUBERNETES_SERVICE_HOST
  value: {{ . | quote }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ $.Values.apiServer.port | quote }}
{{- end }}
{{- end }}

{{/* An HTTP probe of the agent: the path is the argument's. */}}
{{- define "longshore.agentProbe" -}}
{{- $port := splitList ":" .root.Values.agent.healthAddress | last -}}
{{- $host := .root.Values.agent.healthAddress | trimSuffix (printf ":%s" $port) | trimPrefix "[" | trimSuffix "]" -}}
httpGet:
  path: {{ .path }}
  port: {{ $port }}
  {{- if not (has $host (list "" "0.0.0.0" "::")) }}
  host: {{ $host | quote }}
  {{- end }}
{{- end }}
