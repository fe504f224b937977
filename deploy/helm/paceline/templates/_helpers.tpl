{{/* Names. */}}
{{- define "paceline.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 52 characters: "-headless" and "-redis-0" follow. */}}
{{- define "paceline.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects the servers: it never changes, since a Deployment's selector cannot. */}}
{{- define "paceline.selector" -}}
app.kubernetes.io/name: {{ include "paceline.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "paceline.redisSelector" -}}
app.kubernetes.io/name: {{ include "paceline.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: redis
{{- end -}}

{{- define "paceline.labels" -}}
app.kubernetes.io/name: {{ include "paceline.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "paceline.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "paceline.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "paceline.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "paceline.tlsSecret" -}}
{{- if .Values.tls.certManager.enabled -}}
{{- printf "%s-tls" (include "paceline.fullname" .) -}}
{{- else -}}
{{- required "tls.enabled needs tls.secretName, or tls.certManager.enabled" .Values.tls.secretName -}}
{{- end -}}
{{- end -}}

{{/* Seconds: the drain that the server is configured with, and what a pod is given for all of its end. What follows the
drain in the server (last answers, last alerts, the store) is bounded by 5 s; the rest is reserve. */}}
{{- define "paceline.drainSeconds" -}}
{{- add .Values.drain.longestWaitSeconds .Values.drain.handOverSeconds -}}
{{- end -}}

{{- define "paceline.graceSeconds" -}}
{{- add .Values.drain.endpointsSeconds (include "paceline.drainSeconds" .) 10 -}}
{{- end -}}

{{/* The configuration file: the values' with what the chart decides. */}}
{{- define "paceline.config" -}}
{{- $own := dict "listen" "0.0.0.0:7133" "metrics_listen" "0.0.0.0:9464" "log_format" "json" "log_level" .Values.logging.level -}}
{{- if eq .Values.store.kind "embedded" -}}
{{- $_ := set $own "store" "embedded:/var/lib/paceline/paceline.db" -}}
{{- else -}}
{{- $_ := set $own "peer_listen" "0.0.0.0:7134" -}}
{{- if eq .Values.store.kind "trial" -}}
{{- $_ := set $own "store" (printf "redis://%s-redis:6379/0" (include "paceline.fullname" .)) -}}
{{- else -}}
{{- $_ := set $own "store_file" (printf "/run/secrets/paceline-store/%s" .Values.store.external.key) -}}
{{- end -}}
{{- end -}}
{{- if .Values.tls.enabled -}}
{{- $tls := dict "cert" "/run/secrets/paceline-tls/tls.crt" "key" "/run/secrets/paceline-tls/tls.key" -}}
{{- if .Values.tls.clientAuth -}}
{{- $_ := set $tls "client_ca" "/run/secrets/paceline-tls/ca.crt" -}}
{{- $_ := set $tls "require_client_cert" true -}}
{{- end -}}
{{- $_ := set $own "tls" $tls -}}
{{- end -}}
{{- range $name := list "listen" "metrics_listen" "log_format" "log_level" "store" "store_file" "peer_listen" "peer_advertise" "node" "tls" -}}
{{- if hasKey $.Values.config $name -}}
{{- fail (printf "config.%s: the chart sets it; see the values beside config" $name) -}}
{{- end -}}
{{- end -}}
{{- $limits := deepCopy (default (dict) .Values.config.limits) -}}
{{- range $name := list "max_wait" "drain_timeout" -}}
{{- if hasKey $limits $name -}}
{{- fail (printf "config.limits.%s: the chart sets it from drain" $name) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $limits "max_wait" (printf "%ds" (int .Values.drain.longestWaitSeconds)) -}}
{{- $_ := set $limits "drain_timeout" (printf "%ss" (include "paceline.drainSeconds" .)) -}}
{{- $_ := set $own "limits" $limits -}}
{{- merge $own (omit (deepCopy .Values.config) "limits") | toYaml -}}
{{- end -}}
