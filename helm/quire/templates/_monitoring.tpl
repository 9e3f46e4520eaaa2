{{- /* The component of a pod as the label "role", by which dashboards tell prefill from decode. */ -}}
{{- define "quire.roleLabel" -}}
- sourceLabels: [__meta_kubernetes_pod_label_app_kubernetes_io_component]
  targetLabel: role
{{- end -}}

{{- define "quire.gatewayScrape" -}}
path: /metrics
interval: {{ .Values.monitoring.podMonitor.interval }}
{{- if .Values.gateway.auth.enabled }}
authorization:
  credentials:
    name: {{ include "quire.apiKeySecret" . }}
    key: api-key
{{- end }}
relabelings:
  {{- include "quire.roleLabel" . | nindent 2 }}
{{- end -}}
