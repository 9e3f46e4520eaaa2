{{- define "quire.workerConfig" -}}
{{- $root := .root -}}
{{- $pool := .settings -}}
model: {{ $root.Values.model.uri | quote }}
served_model_name: {{ include "quire.modelName" $root | quote }}
{{- with $root.Values.model.tokenizer }}
tokenizer: {{ . | quote }}
{{- end }}
{{- with $root.Values.model.revision }}
revision: {{ . | quote }}
{{- end }}
tensor_parallel_size: {{ $pool.tensorParallel }}
device: {{ ternary "cuda" "cpu" (eq $pool.accelerator "nvidia") }}
role: {{ ternary "both" .component (eq .component "unified") }}
listen: 0.0.0.0:9000
drain_timeout_s: {{ $pool.drainSeconds }}
http_port: 9090
log_format: json
kv_host: 0.0.0.0
kv_tcp_port: 9200
kv_grpc_port: 9300
{{ include "quire.tlsOptions" $root }}
{{- with $pool.transfer }}
{{ toYaml . }}
{{- end }}
{{- with $pool.options }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "quire.workerSecurity" -}}
{{- $security := deepCopy .root.Values.securityContext -}}
{{- if .settings.rdma.enabled -}}
{{- /* memory that a network card writes into must stay where it is */ -}}
{{- $capabilities := get $security "capabilities" | default dict -}}
{{- $_ := set $capabilities "add" (concat (get $capabilities "add" | default list) (list "IPC_LOCK") | uniq) -}}
{{- $_ := set $security "capabilities" $capabilities -}}
{{- end -}}
{{- toYaml $security -}}
{{- end -}}

{{- define "quire.workerResources" -}}
{{- $resources := deepCopy .settings.resources -}}
{{- $extra := dict -}}
{{- if eq .settings.accelerator "nvidia" -}}{{- $_ := set $extra "nvidia.com/gpu" (.settings.tensorParallel | int) -}}{{- end -}}
{{- if .settings.rdma.enabled -}}{{- $_ := set $extra .settings.rdma.resource .settings.rdma.count -}}{{- end -}}
{{- range $part := list "requests" "limits" -}}
{{- $_ := set $resources $part (merge (get $resources $part | default dict) (deepCopy $extra)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
