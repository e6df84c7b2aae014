// What deploy/ uses of other people's kinds. Of Issuers only the two sorts that stand in overlays/mtls.
import type { ICertificate } from "@kubernetes-models/cert-manager/cert-manager.io/v1/Certificate";
import type { ICAIssuer } from "@kubernetes-models/cert-manager/cert-manager.io/v1/CAIssuer";
import type { IIssuer } from "@kubernetes-models/cert-manager/cert-manager.io/v1/Issuer";
import type { ISelfSignedIssuer } from "@kubernetes-models/cert-manager/cert-manager.io/v1/SelfSignedIssuer";
import type { IScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject";
import type { IPodMonitor } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PodMonitor";
import type { IPrometheusRule } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PrometheusRule";

export type PodMonitor = IPodMonitor;
export type PrometheusRule = IPrometheusRule;
export type ScaledObject = IScaledObject;
export type Certificate = ICertificate;
export interface Issuer {
  apiVersion: IIssuer["apiVersion"];
  kind: IIssuer["kind"];
  metadata?: IIssuer["metadata"];
  spec: { ca?: ICAIssuer; selfSigned?: ISelfSignedIssuer };
}
