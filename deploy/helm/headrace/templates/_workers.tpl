{{/* Whether workers of (root, role) are groups of several pods. */}}
{{- define "headrace.isLws" -}}
{{- gt (int (index (index . 0).Values (index . 1)).group.pods) 1 -}}
{{- end }}

{{/* Ranks of a worker of (root, role): of all its pods. */}}
{{- define "headrace.numRanks" -}}
{{- with (index (index . 0).Values (index . 1)).group }}{{ mul .pods .ranksPerPod }}{{ end -}}
{{- end }}

{{/* What a worker would refuse, said before anything is started. */}}
{{- define "headrace.checkGroup" -}}
{{- $role := index . 1 -}}
{{- $values := index (index . 0).Values $role -}}
{{- if and (index . 0).Values.tls.enabled (not (index $values.options "ranks-in-clear")) -}}
{{- fail (printf "%s.options.ranks-in-clear: with tls.enabled, and %d pods a group, say that ranks may talk unencrypted" $role (int $values.group.pods)) -}}
{{- end -}}
{{- end }}

{{/*
The pod template of (root, role, whether it serves). All ranks of a group have the same command line; torchrun starts a
pod's, and ends them all when one ends. It waits a little longer for them than they take to drain and to stop.
*/}}
{{- define "headrace.workerPod" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $serves := index . 2 -}}
{{- $worker := list $root $role -}}
{{- $values := index $root.Values $role -}}
{{- $isGroup := gt (int (include "headrace.numRanks" $worker)) 1 -}}
metadata:
  labels:
    {{- include "headrace.selector" $worker | nindent 4 }}
    {{- if eq (include "headrace.isLws" $worker) "true" }}
    headrace/serves: {{ $serves | quote }}
    {{- end }}
spec:
  {{- include "headrace.pod" $worker | nindent 2 }}
  {{- with $values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  containers:
    - {{- include "headrace.container" (list $root $role $serves) | nindent 6 }}
      {{- if $isGroup }}
      command: [tini, --, python, -m, torch.distributed.run]
      {{- end }}
      args:
        {{- if $isGroup }}
        {{- include "headrace.torchrun" $worker | nindent 8 }}
        {{- end }}
        {{- include "headrace.ownArguments" $worker | nindent 8 }}
        # By number, as the router knows it: a name is looked up, and one that is new not found for a while.
        - --advertise=$(POD_IP):{{ include "headrace.grpcPort" $role }}
        {{- if not $root.Values.tls.enabled }}
        - --peers={{ include "headrace.workers" $root }}
        {{- end }}
        {{- include "headrace.options" $values.options | nindent 8 }}
      env:
        {{- include "headrace.environment" $worker | nindent 8 }}
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        {{- include "headrace.threads" $worker | nindent 8 }}
        - {name: OMP_WAIT_POLICY, value: PASSIVE}
      {{- $devices := merge (dict) $values.devices }}
      {{- with $values.accelerator }}{{ $_ := set $devices . $values.group.ranksPerPod }}{{ end }}
      resources: {{ merge (dict "limits" (merge (dict) $devices $values.resources.limits)) $values.resources | toJson }}
      volumeMounts:
        {{- include "headrace.mounts" $worker | nindent 8 }}
        {{- if $isGroup }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
  volumes:
    {{- include "headrace.volumes" $worker | nindent 4 }}
    {{- if $isGroup }}
    # Ranks of a pod pass bytes by it, NCCL more than the runtime's 64 MiB.
    - {name: shm, emptyDir: {medium: Memory}}
    {{- end }}
{{- end }}

{{/* torchrun's own arguments for a pod of (root, role), up to the worker's. */}}
{{- define "headrace.torchrun" -}}
{{- $values := index (index . 0).Values (index . 1) -}}
{{- if eq (include "headrace.isLws" .) "true" -}}
- --nnodes=$(LWS_GROUP_SIZE)
- --node-rank=$(LWS_WORKER_INDEX)
- --master-addr=$(LWS_LEADER_ADDRESS)
{{- else -}}
- --nnodes=1
- --master-addr=127.0.0.1
{{- end }}
- --master-port={{ include "headrace.ranksPort" . }}
- --nproc-per-node={{ $values.group.ranksPerPod }}
- --shutdown-timeout={{ sub (include "headrace.graceSeconds" .) 3 }}
- --module
- headrace_{{ index . 1 }}
{{- end }}

{{/* As many threads as the pod has cores, where torch would count the node's; a group's ranks share the pod's. */}}
{{- define "headrace.threads" -}}
{{- $values := index (index . 0).Values (index . 1) -}}
{{- $setting := printf "HEADRACE_%s_THREADS" (upper (index . 1)) -}}
{{- $ranks := int $values.group.ranksPerPod -}}
{{- if eq $ranks 1 -}}
- {name: {{ $setting }}, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: "1"}}}
- {name: OMP_NUM_THREADS, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: "1"}}}
{{- else -}}
{{- $threads := max 1 (div (dig "limits" "cpu" 1 $values.resources | toString | int) $ranks) | quote -}}
- {name: {{ $setting }}, value: {{ $threads }}}
- {name: OMP_NUM_THREADS, value: {{ $threads }}}
{{- end }}
{{- end }}

{{/* Where a group's ranks find rank 0. */}}
{{- define "headrace.ranksPort" -}}
29500
{{- end }}
