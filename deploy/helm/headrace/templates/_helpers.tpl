{{/* Every object's name begins so: the release's name, with the chart's where it does not have it. */}}
{{- define "headrace.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* gRPC's port of a role, the same as in docs/operations.md. */}}
{{- define "headrace.grpcPort" -}}
{{- get (dict "router" "50050" "prefill" "50051" "decode" "50052") . -}}
{{- end }}

{{/* What the objects of (root, role) are found by; with no role, those of the release. */}}
{{- define "headrace.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- with index . 1 }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{- define "headrace.metadata" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
name: {{ include "headrace.fullname" $root }}{{ with $role }}-{{ . }}{{ end }}
labels:
  {{- include "headrace.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ $root.Release.Service }}
  helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{/* The options of a role as arguments. Numbers as JSON: a template's own way makes 4194304 into 4.194304e+06. */}}
{{- define "headrace.options" -}}
{{- range $name, $value := . }}
{{- $text := kindIs "string" $value | ternary $value (toJson $value) }}
- {{ printf "--%s=%s" $name $text | quote }}
{{- end }}
{{- end }}

{{/*
How long Kubernetes waits after it asked a process of (root, role) to end: a process has drain-s to drain and again, with
two seconds, to stop (headrace_core/process.py); a router first waits until nobody is sent to it.
*/}}
{{- define "headrace.preStopSeconds" -}}
{{- get (dict "router" "5" "prefill" "0" "decode" "0") . -}}
{{- end }}
{{- define "headrace.drainSeconds" -}}
{{- index (index . 0).Values (index . 1) | dig "options" "drain-s" 10 | ceil | int -}}
{{- end }}
{{- define "headrace.graceSeconds" -}}
{{- /* A group's other ranks wait a little longer than the one that drains (worker/run_worker.py). */}}
{{- $isGroup := and (ne (index . 1) "router") (gt (int (include "headrace.numRanks" .)) 1) -}}
{{- add (include "headrace.preStopSeconds" (index . 1)) (include "headrace.drainSeconds" . | mul 2) 5 ($isGroup | ternary 15 0) -}}
{{- end }}

{{/*
By the gRPC health service. The kubelet speaks it without TLS alone, so with it a process asks itself, with its own
certificate; a router that clients know by another one, which that does not verify, is asked for its port.
*/}}
{{- define "headrace.probe" -}}
{{- if and (eq (index . 1) "router") (index . 0).Values.router.tlsSecret -}}
tcpSocket: {port: grpc}
timeoutSeconds: 5
{{- else if (index . 0).Values.tls.enabled -}}
exec: {command: [python, -m, headrace_core.probe, "127.0.0.1:{{ include "headrace.grpcPort" (index . 1) }}"]}
timeoutSeconds: 10
{{- else -}}
grpc: {port: {{ include "headrace.grpcPort" (index . 1) }}}
timeoutSeconds: 5
{{- end }}
{{- end }}

{{/*
A worker that was drained by hand is NOT_SERVING and stays so: the last of these starts it again, after it had the time
to drain. A large checkpoint takes its time to load: half an hour. A probe that is a process of its own comes less often.
*/}}
{{- define "headrace.probes" -}}
{{- $probe := include "headrace.probe" . -}}
{{- $isProcess := hasPrefix "exec" $probe -}}
startupProbe:
  {{- $probe | nindent 2 }}
  periodSeconds: {{ $isProcess | ternary 10 2 }}
  failureThreshold: {{ $isProcess | ternary 180 900 }}
readinessProbe:
  {{- $probe | nindent 2 }}
  periodSeconds: {{ $isProcess | ternary 10 5 }}
  failureThreshold: 2
livenessProbe:
  {{- $probe | nindent 2 }}
  periodSeconds: 10
  failureThreshold: {{ max 6 (add 2 (div (include "headrace.drainSeconds" . | int) 10)) }}
{{- end }}

{{- define "headrace.image" -}}
{{- $values := index (index . 0).Values (index . 1) -}}
{{- with (index . 0).Values.image.registry }}{{ . }}/{{ end -}}
{{ $values.image }}:{{ $values.tag | default (index . 0).Values.image.tag | default (index . 0).Chart.AppVersion }}
{{- end }}

{{/* What the pods of every (root, role) have in common. */}}
{{- define "headrace.pod" -}}
{{- $root := index . 0 -}}
{{- $values := index $root.Values (index . 1) -}}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "headrace.graceSeconds" . }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with $values.affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- end }}

{{- define "headrace.container" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
name: {{ $role }}
image: {{ include "headrace.image" . | quote }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
{{- /* A pod that follows another of its group serves nobody: it is well as long as it runs. */}}
{{- if ne (last . | toString) "false" }}
ports:
  - {name: grpc, containerPort: {{ include "headrace.grpcPort" $role }}}
  {{- if eq $role "router" }}
  - {name: http, containerPort: 8000}
  {{- end }}
  - {name: metrics, containerPort: 9100}
{{ include "headrace.probes" . }}
{{- end }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* The environment that (root, role) has of what all processes have. HOME is for caches of compiled kernels. */}}
{{- define "headrace.environment" -}}
{{- $values := (index . 0).Values -}}
{{- $setting := printf "HEADRACE_%s" (upper (index . 1)) -}}
- {name: HOME, value: /tmp}
{{- if $values.tls.enabled }}
- {name: {{ $setting }}_TLS, value: /certs}
{{- end }}
{{- if not (kindIs "invalid" $values.tracing.sampleShare) }}
- {name: {{ $setting }}_TRACE_SAMPLE, value: {{ toJson $values.tracing.sampleShare | quote }}}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ required "tracing.endpoint: spans are sent to a collector; say where it is" $values.tracing.endpoint | quote }}}
{{- end }}
{{- end }}

{{/* /tmp is all that a process of (root, role) may write to. */}}
{{- define "headrace.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if (index . 0).Values.model.volume }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- if (index . 0).Values.tls.enabled }}
- {name: certs, mountPath: /certs, readOnly: true}
{{- end }}
{{- end }}
{{- define "headrace.volumes" -}}
{{- $role := index . 1 -}}
- {name: tmp, emptyDir: {sizeLimit: 4Gi}}
{{- with (index . 0).Values.model.volume }}
- {{ merge (dict "name" "model") . | toJson }}
{{- end }}
{{- with (index . 0).Values.tls }}
{{- if .enabled }}
{{- $name := required (printf "tls.secrets.%s: with tls.enabled each role has a Secret with tls.crt, tls.key and ca.crt" $role) (index .secrets $role) }}
- {{ include "headrace.secret" (list "certs" $name "tls.crt" "tls.key" "ca.crt") }}
{{- end }}
{{- end }}
{{- end }}

{{/*
A volume (its name, a Secret's, keys of that): files for the pod's fsGroup to read. A Secret that lacks one is not
mounted, and the pod's events say so.
*/}}
{{- define "headrace.secret" -}}
{{- $items := list -}}
{{- range slice . 2 }}{{ $items = append $items (dict "key" . "path" .) }}{{ end -}}
{name: {{ index . 0 }}, secret: {secretName: {{ index . 1 }}, defaultMode: 0440, items: {{ toJson $items }}}}
{{- end }}

{{/* The arguments that the chart itself gives to (root, role); the images' entry point takes them. */}}
{{- define "headrace.ownArguments" -}}
- --model={{ (index . 0).Values.model.path }}
- --listen=0.0.0.0:{{ include "headrace.grpcPort" (index . 1) }}
- --metrics-listen=0.0.0.0:9100
{{- end }}

{{/* Every worker, by the names of both roles: whom the router asks, and whom a worker takes pages from. */}}
{{- define "headrace.workers" -}}
{{- $workers := list -}}
{{- range $role := list "prefill" "decode" -}}
{{- $service := printf "%s-%s.%s.svc" (include "headrace.fullname" $) $role $.Release.Namespace -}}
{{- $workers = append $workers (printf "%s:%s" $service (include "headrace.grpcPort" $role)) -}}
{{- end -}}
{{- join "," $workers -}}
{{- end }}
