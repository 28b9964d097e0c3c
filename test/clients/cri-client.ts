/**
 * What the kubelet asks of containerd's image service (k8s.io/cri-api, pkg/apis/runtime/v1/api.proto), as far as pulls go.
 */
import * as grpc from '@grpc/grpc-js';
import protobuf from 'protobufjs';
import { patience } from '../patience.js';

const { root } = protobuf.parse(`syntax = "proto3"; package runtime.v1;
message ImageSpec { string image = 1; }
message AuthConfig { string username = 1; string password = 2; string identity_token = 5; }
message PodSandboxConfig { map<string, string> annotations = 7; }
message PullImageRequest { ImageSpec image = 1; AuthConfig auth = 2; PodSandboxConfig sandbox_config = 3; }
message PullImageResponse { string image_ref = 1; }
message RemoveImageRequest { ImageSpec image = 1; }
message RemoveImageResponse {}
message ListImagesRequest {}
message Image { string id = 1; repeated string repo_tags = 2; }
message ListImagesResponse { repeated Image images = 1; }
message ImageStatusRequest { ImageSpec image = 1; }
message ImageStatusResponse { Image image = 1; }
message ImageFsInfoRequest {}
message UInt64Value { uint64 value = 1; }
message FilesystemIdentifier { string mountpoint = 1; }
message FilesystemUsage { FilesystemIdentifier fs_id = 2; UInt64Value used_bytes = 3; }
message ImageFsInfoResponse { repeated FilesystemUsage image_filesystems = 1; }`);

/** As the kubelet has them from a pod's secrets. */
export interface PullAuth {
  readonly username: string;
  readonly password: string;
}

/** @param address containerd's socket, or one that passes calls on to it */
export class CriClient {
  readonly #client: grpc.Client;

  constructor(address: string) {
    this.#client = new grpc.Client(`unix:${address}`, grpc.credentials.createInsecure());
  }

  pull(image: string, auth?: PullAuth): Promise<unknown> {
    return this.#call('PullImage', { image: { image }, ...(auth && { auth }) });
  }

  /** With the annotations of the pod that the image is for. */
  pullFor(image: string, annotations: Readonly<Record<string, string>>): Promise<unknown> {
    return this.#call('PullImage', { image: { image }, sandboxConfig: { annotations } });
  }

  list(): Promise<unknown> {
    return this.#call('ListImages', {});
  }

  status(image: string): Promise<unknown> {
    return this.#call('ImageStatus', { image: { image } });
  }

  fileSystems(): Promise<unknown> {
    return this.#call('ImageFsInfo', {});
  }

  remove(image: string): Promise<unknown> {
    return this.#call('RemoveImage', { image: { image } });
  }

  close(): void {
    this.#client.close();
  }

  #call(method: string, message: object): Promise<unknown> {
    const request = root.lookupType(`runtime.v1.${method}Request`);
    const response = root.lookupType(`runtime.v1.${method}Response`);
    return new Promise((resolve, reject) => {
      this.#client.makeUnaryRequest(
        `/runtime.v1.ImageService/${method}`,
        (value: object) => Buffer.from(request.encode(request.create(value)).finish()),
        (bytes) => response.decode(bytes),
        message,
        { deadline: Date.now() + patience(60_000) },
        (error, value) => (error === null ? resolve(value) : reject(error)),
      );
    });
  }
}
