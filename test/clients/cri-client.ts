/**
 * What the kubelet asks of containerd's image service (k8s.io/cri-api, pkg/apis/runtime/v1/api.proto), as far as pulls go.
 */
import * as grpc from '@grpc/grpc-js';
import protobuf from 'protobufjs';
import { patience } from '../patience.js';

const { root } = protobuf.parse(`syntax = "proto3"; package runtime.v1;
message ImageSpec { string image = 1; }
message PullImageRequest { ImageSpec image = 1; }
message PullImageResponse { string image_ref = 1; }
message RemoveImageRequest { ImageSpec image = 1; }
message RemoveImageResponse {}`);

/** @param address containerd's socket */
export class CriClient {
  readonly #client: grpc.Client;

  constructor(address: string) {
    this.#client = new grpc.Client(`unix:${address}`, grpc.credentials.createInsecure());
  }

  pull(image: string): Promise<unknown> {
    return this.#call('PullImage', { image: { image } });
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
